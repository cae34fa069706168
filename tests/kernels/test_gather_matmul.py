"""gather_matmul: every backend and instruction set against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable, NumericsError
from trimtab.kernels import bench, library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.gather_matmul import GatherWeight, gather_matmul, native
from trimtab.kernels.gather_matmul import bench as gather_bench
from trimtab.kernels.gather_matmul.prepared import prepared_gather
from trimtab.kernels.gather_matmul.reference import gather_matmul_reference

from .conftest import inputs, needs_native, relative_rms
from .guarded import run_guarded
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 5), (64, 64), (33, 129), (200, 63), (101, 301)]
"""(in, out)"""
THRESHOLDS = [-1.0, 0.0, 0.7, 1.5, float("inf")]


def columns_of(width: int, out: int, dtype: torch.dtype) -> Tensor:
    return inputs(width, out, dtype, seed=2)


def scale_of(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(5)) + 0.5


def factors_of(width: int, out: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return inputs(out, rank, dtype, seed=3), inputs(rank, width, dtype, seed=4)


def exact(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """float64 [rows, out]; which inputs count is a matter of float32."""
    magnitude = x.float().abs() if scale is None else x.float().abs() * scale
    large = magnitude > torch.tensor(threshold, dtype=torch.float32)
    out = torch.where(large, x, 0).double() @ columns.double()
    if left is not None and right is not None:
        out += torch.where(large, 0, x).double() @ right.double().T @ left.double().T
    return out


def close(found: Tensor, expected: Tensor, bound: float) -> bool:
    return float((found.double() - expected).norm()) <= bound * float(expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_reference_is_the_definition(dtype: torch.dtype, threshold: float) -> None:
    for width, out in SHAPES[:4]:
        x, columns = inputs(3, width, dtype), columns_of(width, out, dtype)
        for scale in (None, scale_of(width)):
            for factors in ((), factors_of(width, out, 3, dtype)):
                found = gather_matmul_reference(x, columns, threshold, scale, *factors)
                assert found.dtype == dtype
                assert close(found, exact(x, columns, threshold, scale, *factors), RMS_BOUND[dtype]), (width, out)


@needs_native
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_parity(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Outputs are rounded once: within half a unit in the last place, and the little that float32 sums lose."""
    unit = torch.finfo(x_dtype).eps
    for width, out in SHAPES:
        columns, scale = columns_of(width, out, dtype), scale_of(width)
        for threshold in THRESHOLDS:
            for rows in (1, 2, 5, native.MAX_ROWS):
                x = inputs(rows, width, x_dtype)
                for norms in (None, scale):
                    found = native.gather_matmul_native(x, columns, threshold, norms)
                    expected = exact(x, columns, threshold, norms)
                    assert found.dtype == x_dtype
                    assert found.shape == (rows, out)
                    assert close(found, expected, RMS_BOUND[x_dtype]), (width, out, threshold, rows)
                    lost = 1e-6 * (exact(x.abs(), columns.abs(), threshold, norms) + 1)
                    assert ((found - expected).abs() <= unit / 2 * expected.abs() + lost).all()


@needs_native
@pytest.mark.parametrize("factor_dtype", HALVES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_native_parity_with_a_low_rank_rest(isa: str, x_dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    """Inputs and inner result are rounded to the format of the factors: twice half a unit at most."""
    bound = max(RMS_BOUND[x_dtype], torch.finfo(factor_dtype).eps)
    for (width, out), rank in zip(SHAPES, (1, 3, 16, 64, 5, 33), strict=True):
        columns, factors = columns_of(width, out, torch.bfloat16), factors_of(width, out, rank, factor_dtype)
        for threshold in THRESHOLDS:
            for rows in (1, 3, native.MAX_ROWS):
                x, scale = inputs(rows, width, x_dtype), scale_of(width) if rows == 3 else None
                found = native.gather_matmul_native(x, columns, threshold, scale, *factors)
                expected = exact(x, columns, threshold, scale, *factors)
                assert close(found, expected, bound), (width, out, rank, threshold, rows)


def test_selecting_all_is_the_dense_product_and_full_rank_too() -> None:
    x, columns = inputs(3, 40, torch.float32), columns_of(40, 24, torch.float32)
    dense = x @ columns
    torch.testing.assert_close(gather_matmul(x, columns, 0.0), dense)
    assert not gather_matmul(x, columns, float("inf")).any()
    u, s, vh = torch.linalg.svd(columns.T, full_matrices=False)
    for threshold in THRESHOLDS:
        torch.testing.assert_close(gather_matmul(x, columns, threshold, None, u * s, vh), dense, rtol=1e-4, atol=1e-4)


@needs_native
def test_an_input_at_the_threshold_does_not_count(isa: str) -> None:
    x = torch.tensor([[0.5, -0.5, 0.5000001, -0.50000006, 0.0]])
    columns = torch.eye(5)
    for run in (native.gather_matmul_native, gather_matmul_reference):
        assert run(x, columns, 0.5)[0].tolist() == [0, 0, x[0, 2].item(), x[0, 3].item(), 0]
        halves = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0])
        assert (run(x, columns, 0.5, halves)[0] != 0).tolist() == [False, True, False, True, False]


@needs_native
def test_several_weights_in_one_call_are_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads, also where there are fewer outputs or inputs than threads share."""
    monkeypatch.delenv("TRIMTAB_KERNELS", raising=False)
    weights = []
    for place, (out, rank) in enumerate(((200, 3), (64, 0), (1, 1), (517, 16))):
        left, right = factors_of(301, out, rank, torch.bfloat16) if rank else (None, None)
        threshold, scale = torch.tensor([0.4 + 0.2 * place]), scale_of(301) if place % 2 else None
        weights.append(GatherWeight(columns_of(301, out, torch.bfloat16), threshold, scale, left, right))
    product, before = prepared_gather(weights), torch.get_num_threads()
    try:
        with torch.no_grad():
            for rows in (1, 3, native.MAX_ROWS):
                x = inputs(rows, 301, torch.bfloat16)
                torch.set_num_threads(1)
                alone = [gather_matmul(x, w.columns, float(w.threshold), w.scale, w.left, w.right) for w in weights]
                for threads in (1, 2, 3, 4, 6):
                    torch.set_num_threads(threads)
                    assert product.accepts(x)
                    found = product.run(x)
                    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), (rows, threads)
            weights[0].threshold.fill_(float("inf"))
            assert not torch.equal(product.run(x)[0], alone[0])
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, dtype: torch.dtype) -> None:
    columns, factors = columns_of(300, 517, dtype), factors_of(300, 517, 64, dtype)
    x = inputs(native.MAX_ROWS, 300, dtype)
    before = torch.get_num_threads()
    try:
        for given in ((), factors):
            alone = torch.stack([native.gather_matmul_native(row, columns, 0.8, None, *given) for row in x])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for rows in range(1, native.MAX_ROWS + 1):
                    found = native.gather_matmul_native(x[:rows], columns, 0.8, None, *given)
                    assert torch.equal(found, alone[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_many_outputs_are_summed_in_blocks_and_shares() -> None:
    columns, x = columns_of(16, 9001, torch.bfloat16), inputs(3, 16, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found = native.gather_matmul_native(x, columns, 0.5)
            assert relative_rms(found, exact(x, columns, 0.5)) <= RMS_BOUND[torch.float32]
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, bad: float) -> None:
    """NaN is above no threshold, but counts: else it would vanish."""
    columns, factors = columns_of(80, 9, torch.bfloat16), factors_of(80, 9, 4, torch.bfloat16)
    for position in (3, 79):
        x = inputs(3, 80, torch.bfloat16)
        x[1, position] = bad
        for run in (native.gather_matmul_native, gather_matmul_reference):
            for given in ((), factors):
                found = run(x, columns, 100.0, None, *given)
                assert not torch.isfinite(found[1]).any()
                assert torch.isfinite(found[[0, 2]]).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_axes(dtype: torch.dtype) -> None:
    columns = columns_of(64, 9, torch.bfloat16)
    x = inputs(64, 6, dtype).T.reshape(2, 3, 64)
    wide = inputs(4, 128, dtype)[:, ::2]
    for case in (x, x.transpose(0, 1), wide, x[0, 0], x[:0], wide[2:].expand(2, 2, 64), wide[2:].expand(5, 2, 64)):
        found = gather_matmul(case, columns, 0.5)
        assert found.shape == (*case.shape[:-1], 9)
        assert torch.equal(found, gather_matmul(case.clone(memory_format=torch.contiguous_format), columns, 0.5))
    assert gather_matmul(x, columns[:, :0].contiguous(), 0.5).shape == (2, 3, 0)
    assert torch.equal(gather_matmul(x[..., :0], columns[:0], 0.5), torch.zeros(2, 3, 9, dtype=dtype))
    rank_0 = torch.zeros(9, 0).half(), torch.zeros(0, 64).half()
    assert torch.equal(gather_matmul(x, columns, 0.5, None, *rank_0), gather_matmul(x, columns, 0.5))


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out in (1, 3, 7, 33, 301):
        for rows in (1, 2, 8):
            for threshold in (0.5, float("inf")):
                x, columns = inputs(rows, 144, torch.bfloat16), columns_of(144, out, torch.bfloat16)
                assert torch.isfinite(native.gather_matmul_native(x, columns, threshold)).all()


@pytest.mark.parametrize("isa", library.ISAS)
def test_native_touches_no_other_memory(isa: str) -> None:
    code = """
import torch
from conftest import inputs
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.gather_matmul import native
for at_end in (True, False):
    for width, out in ((1, 1), (7, 64), (65, 5), (40, 1001)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rows in (1, 3, 8):
                x, columns, scale = inputs(rows, width, dtype), inputs(width, out, dtype), torch.rand(width) + 0.5
                factors = inputs(out, 5, torch.float16), inputs(5, width, torch.float16)
                for threshold in (-1.0, 0.5, float("inf")):
                    for given in ((scale,), (scale, *factors)):
                        plain = native.gather_matmul_native(x, columns, threshold, *given)
                        arguments = [fenced(tensor, at_end) for tensor in given]
                        with fenced_outputs(at_end):
                            found = native.gather_matmul_native(
                                fenced(x, at_end), fenced(columns, at_end), threshold, *arguments
                            )
                        assert torch.equal(found, plain)
                        areas.clear()
"""
    run_guarded(code, isa)


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import inputs, relative_rms
from kernels.test_gather_matmul import DTYPES, THRESHOLDS, close, columns_of, exact, factors_of, scale_of
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.gather_matmul import gather_matmul
for number, (width, out, rows) in enumerate(((7, 5, 1), (64, 128, 2), (129, 33, 8), (63, 200, 3), (40, 9, 1))):
    x, columns = inputs(rows, width, DTYPES[number % 3]), columns_of(width, out, DTYPES[number % 2])
    for threshold in THRESHOLDS:
        scale = scale_of(width) if number % 2 else None
        for factors in ((), factors_of(width, out, 3, torch.bfloat16)):
            found = gather_matmul(x, columns, threshold, scale, *factors)
            assert close(found, exact(x, columns, threshold, scale, *factors), RMS_BOUND[x.dtype]), (width, threshold)
x[0, 3] = float("nan")
assert torch.isnan(gather_matmul(x, columns, 100.0)).all()
"""
    run_interpreted(code)


# Dispatch


def _call(**changes: Any) -> Tensor:
    x, columns = inputs(1, 64, torch.float32), columns_of(64, 4, torch.float16)
    return gather_matmul(**({"x": x, "columns": columns, "threshold": 0.5} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 63)}, r"x ends in \[63\], but the columns are \[64, 4\], \[in, out\]"),
        ({"columns": torch.zeros(64)}, r"columns are torch.float32 \[64\]"),
        ({"columns": torch.zeros(64, 4, dtype=torch.int8)}, "columns are torch.int8"),
        ({"threshold": float("nan")}, "threshold is NaN"),
        ({"scale": torch.ones(4)}, r"scale is torch.float32 \[4\]; 64 inputs take float32 \[64\]"),
        ({"scale": torch.ones(64).half()}, "scale is torch.float16"),
        ({"left": torch.zeros(4, 2)}, "give both left and right"),
        ({"left": torch.zeros(4, 2), "right": torch.zeros(3, 64)}, r"\[4, 2\] and right torch.float32 \[3, 64\]"),
        ({"left": torch.zeros(4, 2), "right": torch.zeros(2, 64).half()}, "left is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _call(**changes)


def test_gradients_come_from_the_reference() -> None:
    columns = columns_of(64, 4, torch.float32)
    x = inputs(2, 64, torch.float32).requires_grad_()
    gather_matmul(x, columns, 0.5).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(x.detach().abs() > 0.5, columns.sum(1), 0))


@needs_native
def test_forced_backend_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    many = inputs(native.MAX_ROWS + 1, 64, torch.float32)
    assert torch.equal(_call(x=many), gather_matmul_reference(many, columns_of(64, 4, torch.float16), 0.5))
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="has more than 8 rows"):
        _call(x=many)
    with pytest.raises(KernelUnavailable, match="x is torch.float64"):
        _call(x=torch.zeros(1, 64, dtype=torch.float64))
    with pytest.raises(KernelUnavailable, match="a gradient is wanted"):
        _call(x=torch.zeros(1, 64, requires_grad=True))
    with pytest.raises(KernelUnavailable, match="factors are torch.float32"):
        _call(left=torch.zeros(4, 2), right=torch.zeros(2, 64))
    with pytest.raises(KernelUnavailable, match="columns of shape .* not contiguous"):
        _call(columns=torch.zeros(4, 64).T)


# The benchmark


def test_benchmark_entries_and_no_speed_when_parity_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth_gbps", lambda: 10.0)
    small = bench.Shape(96, 256, 1, traffic_bytes=1 << 16)
    cases = [(1.0, 0), (0.5, 8)]
    entries = gather_bench.gather_matmul_bench([small], cases)
    assert [entry["system"] for entry in entries] == [
        "trimtab/gather-100.0%",
        "trimtab/gather-50.0%-rank-8",
        "trimtab/half-linear",
        "torch/bf16-linear",
    ]
    assert entries[0]["weight_bytes"] == 2 * 96 * 256
    assert entries[1]["weight_bytes"] <= 2 * 96 * 128 + 2 * 8 * (96 + 256)
    assert {entry["bench"] for entry in entries} == {"gather-matmul"}
    assert "gather-matmul" in bench.BENCHMARKS
    right = gather_bench.gather_matmul
    monkeypatch.setattr(gather_bench, "gather_matmul", lambda *a: right(*a) * 1.01)
    with pytest.raises(NumericsError, match="speed is not reported"):
        gather_bench.gather_matmul_bench([small], cases)
