"""sparse_matmul: every backend and instruction set against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable, NumericsError
from trimtab.kernels import bench, library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.sparse_matmul import bench as sparse_bench
from trimtab.kernels.sparse_matmul import native, sparse_matmul
from trimtab.kernels.sparse_matmul.bitmap import pack_bits, unpack_bits
from trimtab.kernels.sparse_matmul.reference import dequantize, sparse_matmul_reference

from .conftest import inputs, needs_native, relative_rms
from .guarded import run_guarded
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 7), (13, 64), (9, 65), (33, 200), (6, 1001)]
SHARES = [0.5, 0.1, 0.0, 1.0]

Sparse = tuple[Tensor, Tensor, Tensor]
"""bitmap, values, offsets"""


def sparse(out: int, width: int, share: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Sparse]:
    """(the dense weight, float64; the same, stored). The first and last rows keep all, one in the middle nothing."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(out, width, generator=generator) < share
    if 0 < share < 1 and out > 4:
        keep[0], keep[-1], keep[out // 2] = True, True, False
    weight = torch.randn(out, width, generator=generator).to(dtype)
    offsets = torch.zeros(out + 1, dtype=torch.int32)
    offsets[1:] = keep.sum(1).cumsum(0)
    return torch.where(keep, weight, 0).double(), (pack_bits(keep), weight[keep], offsets)


# The layout


def test_bits_are_where_the_layout_says() -> None:
    mask = torch.zeros(3, 130, dtype=torch.bool)
    mask[0, 0] = mask[1, 63] = mask[1, 66] = mask[2, 129] = True
    bitmap = pack_bits(mask)
    assert bitmap.tolist() == [[1, 0, 0], [-(2**63), 4, 0], [0, 0, 2]]
    octets = bitmap.view(torch.uint8)
    assert [tuple(place) for place in octets.nonzero().tolist()] == [(0, 0), (1, 7), (1, 8), (2, 16)]


@given(rows=st.integers(0, 5), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_bits_round_trip(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), columns), mask)


# Parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
def test_reference_is_the_definition(dtype: torch.dtype, share: float) -> None:
    for out, width in SHAPES:
        dense, weight = sparse(out, width, share, dtype)
        assert torch.equal(dequantize(*weight[:2], width).double(), dense)
        x = inputs(3, width, torch.float32)
        found, expected = sparse_matmul_reference(x, *weight, width), x.double() @ dense.T
        assert float((found - expected).norm()) <= RMS_BOUND[torch.float32] * float(expected.norm())


@needs_native
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_parity(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Outputs are rounded once: within half a unit in the last place, and the little that float32 sums lose."""
    unit = torch.finfo(x_dtype).eps
    for out, width in SHAPES:
        for share in SHARES:
            dense, weight = sparse(out, width, share, dtype)
            for rows in range(1, native.MAX_ROWS + 1):
                x = inputs(rows, width, x_dtype)
                found, expected = native.sparse_matmul_native(x, *weight, width), x.double() @ dense.T
                assert found.dtype == x_dtype
                assert found.shape == (rows, out)
                error, size = float((found - expected).norm()), float(expected.norm())
                assert error <= RMS_BOUND[x_dtype] * size, (out, width, share, rows)
                lost = 1e-6 * (x.double().abs() @ dense.abs().T + 1)
                assert ((found - expected).abs() <= unit / 2 * expected.abs() + lost).all(), (out, width, share, rows)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_go_by_written_out_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(native, "BLOCK_WEIGHTS", 2000)
    dense, weight = sparse(33, 200, 0.4, dtype)
    for out_dtype in DTYPES:
        buffer = torch.full((5, 200), torch.nan, dtype=out_dtype)
        assert torch.equal(native.write_out(*weight, 7, buffer), dense[7:12].to(out_dtype))
        x = inputs(native.MAX_ROWS + 9, 200, out_dtype)
        assert relative_rms(native.sparse_matmul_native(x, *weight, 200), x.double() @ dense.T) <= RMS_BOUND[out_dtype]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, dtype: torch.dtype) -> None:
    weight = sparse(517, 352, 0.5, dtype)[1]
    x = inputs(native.MAX_ROWS, 352, dtype)
    alone = torch.stack([native.sparse_matmul_native(row, *weight, 352) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, native.MAX_ROWS + 1):
                found = native.sparse_matmul_native(x[:rows], *weight, 352)
                assert torch.equal(found, alone[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_threads_share_rows_of_any_lengths() -> None:
    """All entries in few rows, where equal shares of entries are unequal shares of rows."""
    before = torch.get_num_threads()
    try:
        for full in (slice(0, 1), slice(299, 300), slice(0, 300), slice(0, 0), slice(100, 140)):
            keep = torch.zeros(300, 640, dtype=torch.bool)
            keep[full] = True
            weight = torch.randn(300, 640, generator=torch.Generator().manual_seed(0))
            offsets = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()
            x = inputs(2, 640, torch.float32)
            expected = x.double() @ torch.where(keep, weight, 0).double().T
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found = native.sparse_matmul_native(x, pack_bits(keep), weight[keep], offsets, 640)
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype, bad: float) -> None:
    """Also in rows that do not keep the column, as in the dense product."""
    weight = sparse(9, 80, 0.5, dtype)[1]
    for position in (3, 79):
        x = inputs(3, 80, dtype)
        x[1, position] = bad
        for found in (native.sparse_matmul_native(x, *weight, 80), sparse_matmul_reference(x, *weight, 80)):
            assert not torch.isfinite(found[1]).any()
            assert torch.isfinite(found[[0, 2]]).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_axes(dtype: torch.dtype) -> None:
    weight = sparse(9, 64, 0.5, torch.bfloat16)[1]
    x = inputs(64, 6, dtype).T.reshape(2, 3, 64)
    wide = inputs(4, 128, dtype)[:, ::2]
    for case in (x, x.transpose(0, 1), wide, x[0, 0], x[:0], wide[2:].expand(2, 2, 64), wide[2:].expand(5, 2, 64)):
        found = sparse_matmul(case, *weight, 64)
        assert found.shape == (*case.shape[:-1], 9)
        assert torch.equal(found, sparse_matmul(case.clone(memory_format=torch.contiguous_format), *weight, 64))
    empty = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0), torch.zeros(1, dtype=torch.int32)
    assert sparse_matmul(x, *empty, 64).shape == (2, 3, 0)


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out in (1, 3, 7, 33, 301):
        weight = sparse(out, 144, 0.3, torch.bfloat16)[1]
        for rows in (1, 2, 5, 8, 11):
            assert torch.isfinite(native.sparse_matmul_native(inputs(rows, 144, torch.bfloat16), *weight, 144)).all()


@pytest.mark.parametrize("isa", library.ISAS)
def test_native_touches_no_other_memory(isa: str) -> None:
    code = """
import torch
from conftest import inputs
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.sparse_matmul import native
from trimtab.kernels.sparse_matmul.bitmap import pack_bits
for at_end in (True, False):
    for width, share in ((1, 1.0), (64, 0.5), (65, 0.03), (200, 0.5), (1001, 1.0)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for out, rows in ((1, 1), (5, 3), (9, 8), (3, 11)):
                keep, x = torch.rand(out, width) < share, inputs(rows, width, torch.bfloat16)
                offsets = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()
                weight = pack_bits(keep), torch.randn(out, width)[keep].to(dtype), offsets
                plain = native.sparse_matmul_native(x, *weight, width)
                arguments = [fenced(tensor, at_end) if tensor.numel() else tensor for tensor in (x, *weight)]
                with fenced_outputs(at_end):
                    assert torch.equal(native.sparse_matmul_native(*arguments, width), plain)
                areas.clear()
"""
    run_guarded(code, isa)


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import inputs, relative_rms
from kernels.test_sparse_matmul import DTYPES, sparse
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.sparse_matmul import sparse_matmul
for number, (out, width, rows) in enumerate(((1, 7, 1), (13, 64, 3), (33, 129, 9), (5, 200, 2), (37, 70, 17))):
    dense, weight = sparse(out, width, (0.5, 1.0, 0.3)[number % 3], DTYPES[number % 3])
    x = inputs(rows, width, DTYPES[(number + number // 3) % 3])
    error = relative_rms(sparse_matmul(x, *weight, width), x.double() @ dense.T)
    assert error <= RMS_BOUND[x.dtype], (out, width, rows, error)
assert not sparse_matmul(x, *sparse(37, 70, 0.0, torch.float32)[1], 70).any()
"""
    run_interpreted(code)


# Dispatch


def _call(**changes: Any) -> Tensor:
    bitmap, values, offsets = sparse(4, 70, 1.0, torch.float16)[1]
    arguments = {"x": inputs(1, 70, torch.float32), "bitmap": bitmap, "values": values, "offsets": offsets}
    return sparse_matmul(**(arguments | {"in_features": 70} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 63)}, r"x ends in \[63\], .* in_features=70"),
        ({"bitmap": torch.zeros(4, 1, dtype=torch.int64)}, r"\[4, 1\]; 70 inputs take int64 \[out, 2\]"),
        ({"bitmap": torch.zeros(4, 2)}, "bitmap is torch.float32"),
        ({"values": torch.zeros(4, 8)}, r"values are torch.float32 \[4, 8\]"),
        ({"values": torch.zeros(8, dtype=torch.int8)}, "values are torch.int8"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, r"\[4\]; 4 rows take int32 \[5\]"),
        ({"offsets": torch.zeros(5, dtype=torch.int64)}, "offsets are torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _call(**changes)


def test_gradients_come_from_the_reference() -> None:
    dense, weight = sparse(9, 70, 0.5, torch.float32)
    x = inputs(2, 70, torch.float32).requires_grad_()
    values = weight[1].clone().requires_grad_()
    sparse_matmul(x, weight[0], values, weight[2], 70).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].double(), dense.sum(0), rtol=1e-5, atol=1e-5)
    assert values.grad is not None
    assert values.grad.shape == values.shape


@needs_native
def test_forced_backend_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 70, dtype=torch.float64)
    assert _call(x=x).dtype == torch.float64  # by choice: the reference
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="x is torch.float64"):
        _call(x=x)
    with pytest.raises(KernelUnavailable, match="values is torch.float64"):
        _call(values=torch.zeros(280, dtype=torch.float64))
    with pytest.raises(KernelUnavailable, match="a gradient is wanted"):
        _call(x=torch.zeros(1, 70, requires_grad=True))
    with pytest.raises(KernelUnavailable, match="bitmap of shape .* not contiguous"):
        _call(bitmap=torch.zeros(2, 4, dtype=torch.int64).T)


# The benchmark


def test_benchmark_entries_and_no_speed_when_parity_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth_gbps", lambda: 10.0)
    small = bench.Shape(96, 256, 2, traffic_bytes=1 << 16)
    entries = sparse_bench.sparse_matmul_bench([small], [0.5])
    assert [entry["system"] for entry in entries] == [
        "trimtab/sparse-50%-kept",
        "trimtab/sparse-2:4",
        "trimtab/half-linear",
        "torch/bf16-linear",
    ]
    assert entries[1]["weight_bytes"] == 96 * 256 + 96 * 256 // 8 + 4 * 97  # values, bitmap, offsets
    assert {entry["bench"] for entry in entries} == {"sparse-matmul"}
    assert "sparse-matmul" in bench.BENCHMARKS
    right = sparse_bench.sparse_matmul
    monkeypatch.setattr(sparse_bench, "sparse_matmul", lambda *a: right(*a) * 1.01)
    with pytest.raises(NumericsError, match="speed is not reported"):
        sparse_bench.sparse_matmul_bench([small], [0.5])
