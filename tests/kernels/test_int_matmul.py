"""int_matmul: every backend and instruction set against whole numbers in int64, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable, NumericsError
from trimtab.kernels import bench, library
from trimtab.kernels.int_matmul import bench as int_bench
from trimtab.kernels.int_matmul import int_matmul, native
from trimtab.kernels.int_matmul.reference import int_matmul_reference, round_inputs
from trimtab.kernels.packing import pack

from .conftest import inputs, needs_native
from .guarded import run_guarded
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 64, 130, 300, 1072]  # blocks and tails of every number of bits
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"x_scale": 0.37},
    "asymmetric": {"x_symmetric": False},
}


def weight(out: int, width: int, bits: int, scale_dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, packed, scales)."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, generator=generator)
    return codes, pack(codes, bits), (torch.rand(out, generator=generator) + 0.1).to(scale_dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


# The reference


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_definition(bits: int, mode: str) -> None:
    """In int64, element by element as the formulas say."""
    width, x_bits, options = 70, 4, MODES[mode]
    codes, packed, scales = weight(5, width, bits)
    x = inputs(6, width, torch.float32)
    found = int_matmul_reference(x, packed, scales, bits=bits, in_features=width, x_bits=x_bits, **options)
    for t, row in enumerate(x):
        if mode == "asymmetric":
            s = (row.max() - row.min()) / 15
            z = int((-row.min() / s).round())
            q = ((row / s).round().long() + z).clamp(0, 15) - z
        else:
            s = torch.tensor(0.37) if mode == "static" else row.abs().max() / 7
            q = (row / s).round().long().clamp(-7, 7)
        sums = (codes.long() - 2 ** (bits - 1)) @ q
        assert torch.equal(found[t], sums.float() * scales.float() * s)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("x_bits", [2, 4, 8])
def test_rounded_inputs_are_within_half_a_step(symmetric: bool, x_bits: int) -> None:
    x = inputs(8, 200, torch.float32) + torch.arange(-4.0, 4.0)[:, None]
    q, scale, zero = round_inputs(x, x_bits=x_bits, x_scale=None, x_symmetric=symmetric)
    assert torch.equal(q, q.round())
    assert (q.amin(), q.amax()) == ((-q.amax(), 2 ** (x_bits - 1) - 1) if symmetric else (0, 2**x_bits - 1))
    slack = 0.5 if symmetric else 1.0  # rounding the zero point moves the range by up to half a step
    assert ((scale * (q - zero) - x).abs() <= slack * scale * 1.0001).all()


def test_ties_go_to_even_and_a_static_scale_clips() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 100.0, float("inf")]])
    for backend in (int_matmul_reference, int_matmul):
        found = backend(
            x, pack(torch.eye(7).byte() + 8, 4), torch.ones(7), bits=4, in_features=7, x_bits=4, x_scale=1.0
        )
        assert found.tolist() == [[0, 2, 2, 0, -2, 7, 7]]


# Native


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_native_equals_the_reference(isa: str, bits: int) -> None:
    for width in WIDTHS:
        _, packed, scales = weight(13, width, bits)
        for rows in (1, 2, 7, 8, 19) if width == 300 else (1, 3):
            for number, (mode, options) in enumerate(MODES.items()):
                x = inputs(rows, width, DTYPES[(number + rows) % 3])
                options = options | {"bits": bits, "in_features": width, "x_bits": (4, 8, 3)[(number + width) % 3]}
                found = native.int_matmul_native(x, packed, scales, **options)
                assert same(found, int_matmul_reference(x, packed, scales, **options)), (width, rows, mode, x.dtype)


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_do_not_saturate(isa: str, bits: int, sign: int) -> None:
    """Whole numbers as they are: float32 holds 1032 products of 128 * 127 exactly."""
    width = 1032
    for code in (0, 2**bits - 1):
        packed = pack(torch.full((4, width), code, dtype=torch.uint8), bits)
        x = torch.full((9, width), sign * 127.0)
        options: dict[str, Any] = {"bits": bits, "in_features": width, "x_bits": 8}
        found = native.int_matmul_native(x, packed, torch.ones(4), x_scale=1.0, **options)
        assert (found == sign * 127 * (code - 2 ** (bits - 1)) * width).all()
        mixed = torch.tensor([-50.0, 205.0]).repeat(9, width // 2)  # codes 0 and 255 with step 1 and zero point 50
        found = native.int_matmul_native(mixed, packed, torch.ones(4), x_symmetric=False, **options)
        assert (found == (code - 2 ** (bits - 1)) * 155 * (width // 2)).all()


@needs_native
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wider", [-9, 0, 33])
def test_index_gathers_rounded_inputs(isa: str, index_dtype: torch.dtype, wider: int) -> None:
    """The largest input may be dropped or repeated: it still sets the row's scale."""
    width, rows = 200, 9
    index = torch.randint(0, width, (width + wider,), generator=torch.Generator().manual_seed(0)).to(index_dtype)
    for bits in (2, 3, 4, 8):
        _, packed, scales = weight(11, width + wider, bits)
        for options in MODES.values():
            x = inputs(rows, width, torch.bfloat16)
            options = options | {"bits": bits, "in_features": width + wider, "x_bits": 4}
            found = native.int_matmul_native(x, packed, scales, index=index, **options)
            assert same(found, int_matmul_reference(x, packed, scales, index=index, **options))
            if options.get("x_scale"):  # all rows have one scale: gathering before rounding is the same
                assert same(found, int_matmul_reference(x[:, index], packed, scales, **options))


@needs_native
def test_row_sums_given_are_row_sums_computed(isa: str) -> None:
    codes, packed, scales = weight(45, 300, 4)
    x = inputs(10, 300, torch.float32) + 2
    options: dict[str, Any] = {"bits": 4, "in_features": 300, "x_bits": 4, "x_symmetric": False}
    sums = (codes.long() - 8).sum(1).int()
    found = native.int_matmul_native(x, packed, scales, **options)
    assert same(native.int_matmul_native(x, packed, scales, row_sums=sums, **options), found)
    assert same(int_matmul_reference(x, packed, scales, row_sums=sums, **options), found)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_and_what_is_not_finite(isa: str, dtype: torch.dtype, mode: str) -> None:
    _, packed, scales = weight(5, 80, 4)
    x = inputs(6, 80, dtype)
    x[0] = 0
    x[1, 3], x[2, 79], x[3, 40] = float("nan"), float("inf"), float("-inf")
    x[4] = 12.5  # no range
    options = MODES[mode] | {"bits": 4, "in_features": 80, "x_bits": 4}
    found = native.int_matmul_native(x, packed, scales, **options)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2:4].isfinite().all() if mode == "static" else found[2:4].isnan().all()
    assert torch.equal(found.nan_to_num(7.0), int_matmul_reference(x, packed, scales, **options).nan_to_num(7.0))


@needs_native
@pytest.mark.parametrize("mode", MODES)
def test_neither_batch_nor_threads_nor_chunks_change_a_row(mode: str) -> None:
    _, packed, scales = weight(517, 704, 4)
    x = inputs(21, 704, torch.bfloat16)
    options = MODES[mode] | {"bits": 4, "in_features": 704, "x_bits": 8}
    alone = torch.stack([native.int_matmul_native(row, packed, scales, **options) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(native.int_matmul_native(x, packed, scales, **options), alone)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_more_rows_than_are_rounded_together() -> None:
    """8 MiB of rounded inputs are one pass over the weight."""
    _, packed, scales = weight(3, 4096, 4)
    x = inputs(1, 4096, torch.bfloat16) * torch.linspace(0.1, 2, 4100).bfloat16()[:, None]
    options: dict[str, Any] = {"bits": 4, "in_features": 4096, "x_bits": 8}
    assert same(
        native.int_matmul_native(x, packed, scales, x_scale=0.01, **options),
        int_matmul_reference(x, packed, scales, x_scale=0.01, **options),
    )


@needs_native
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scale_dtypes_strides_and_leading_axes(scale_dtype: torch.dtype) -> None:
    _, packed, scales = weight(9, 192, 4, scale_dtype)
    options: dict[str, Any] = {"bits": 4, "in_features": 192, "x_bits": 8}
    x = inputs(192, 6, torch.float32).T.reshape(2, 3, 192)
    for case in (x, x.transpose(0, 1), x[0, 0], x[:0], inputs(4, 384, torch.float16)[:, ::2]):
        found = int_matmul(case, packed, scales, **options)
        assert found.shape == (*case.shape[:-1], 9)
        assert same(found, int_matmul_reference(case, packed, scales, **options))
    assert int_matmul(x, packed[:0], scales[:0], **options).shape == (2, 3, 0)


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out, rows in ((1, 1), (3, 2), (7, 7), (33, 12), (301, 65)):
        packed = plain(out, 50, dtype=torch.uint8).fill_(0x88)
        found = native.int_matmul_native(
            torch.ones(rows, 100), packed, torch.ones(out), bits=4, in_features=100, x_bits=8
        )
        assert (found == 0).all()


@pytest.mark.parametrize("isa", library.ISAS)
def test_native_touches_no_other_memory(isa: str) -> None:
    code = """
import torch
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.int_matmul import native
from trimtab.kernels.packing import packed_bytes
for at_end in (True, False):
    for bits, width, rows in ((2, 7, 1), (3, 515, 2), (4, 130, 9), (4, 128, 1), (8, 65, 5)):
        x = fenced(torch.randn(rows, width + 3).bfloat16(), at_end)
        packed = fenced(torch.randint(0, 256, (7, packed_bytes(width, bits)), dtype=torch.uint8), at_end)
        scales, sums = fenced(torch.ones(7).half(), at_end), fenced(torch.ones(7).int(), at_end)
        index = fenced(torch.arange(width, dtype=torch.int32), at_end)
        with fenced_outputs(at_end):
            native.int_matmul_native(x, packed, scales, bits=bits, in_features=width, x_bits=4, index=index)
            native.int_matmul_native(
                x, packed, scales, bits=bits, in_features=width, x_bits=4, index=index, x_symmetric=False, row_sums=sums
            )
        areas.clear()
"""
    run_guarded(code, isa)


# Triton


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import inputs
from kernels.test_int_matmul import MODES, weight
from trimtab.kernels.int_matmul import int_matmul
from trimtab.kernels.int_matmul.reference import int_matmul_reference
for width, rows, bits in ((7, 1, 2), (130, 3, 3), (704, 1, 4), (300, 9, 4), (515, 2, 3), (80, 17, 8), (1000, 2, 2)):
    _, packed, scales = weight(37, width, bits)
    index = torch.randint(0, width, (width,), generator=torch.Generator().manual_seed(1))
    for number, options in enumerate(MODES.values()):
        options = options | {"bits": bits, "in_features": width, "x_bits": (4, 8, 8)[number]}
        x = inputs(rows, width, (torch.float32, torch.bfloat16)[number % 2])
        for chosen in (None, index):
            found = int_matmul(x, packed, scales, index=chosen, **options)
            expected = int_matmul_reference(x, packed, scales, index=chosen, **options)
            assert torch.equal(found, expected), (width, rows, bits, options)
"""
    run_interpreted(code)


# Dispatch


def _call(**changes: Any) -> Tensor:
    _, packed, scales = weight(4, 64, 4)
    given = {"x": inputs(1, 64, torch.float32), "packed": packed, "weight_scales": scales}
    return int_matmul(**(given | {"bits": 4, "in_features": 64, "x_bits": 4} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 63)}, r"x ends in \[63\], .* in_features=64 and there is no index"),
        ({"x": torch.zeros(1, 0), "index": torch.zeros(64).int()}, r"x ends in \[0\]"),
        ({"bits": 8}, r"take uint8 \[out, 64\]"),
        ({"bits": 5}, "bits=5"),
        ({"x_bits": 9}, "x_bits=9 must be 2 to 8"),
        ({"weight_scales": torch.ones(3)}, r"weight_scales are \[3\]; .* take \[4\]"),
        ({"index": torch.zeros(63).int()}, r"index is torch.int32 \[63\]; in_features=64"),
        ({"index": torch.zeros(64)}, "index is torch.float32"),
        ({"index": torch.full((64,), 64)}, r"index has entries from 64 to 64, but x ends in \[64\]"),
        ({"index": torch.full((64,), -1).int()}, "index has entries from -1 to -1"),
        ({"x_scale": 0.0}, "x_scale=0.0 must be above 0"),
        ({"x_scale": float("nan")}, "x_scale=nan must be above 0"),
        ({"x_scale": 1.0, "x_symmetric": False}, "x_scale=1.0 is for symmetric inputs"),
        ({"row_sums": torch.zeros(4).int()}, "row_sums are for zero points"),
        ({"row_sums": torch.zeros(4), "x_symmetric": False}, r"row_sums are torch.float32 \[4\]; they are int32 \[4\]"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", ""])
def test_what_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", backend)
    with pytest.raises(ConfigError, match=words):
        _call(**changes)


def test_a_scale_may_be_a_tensor() -> None:
    assert torch.equal(_call(x_scale=torch.tensor(0.25)), _call(x_scale=0.25))


@needs_native
def test_forced_backend_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    assert _call(x=x).dtype == torch.float64  # by choice: the reference
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="x is torch.float64"):
        _call(x=x)
    with pytest.raises(KernelUnavailable, match="a gradient is wanted"):
        _call(x=torch.zeros(1, 64, requires_grad=True))
    with pytest.raises(KernelUnavailable, match=r"index of shape \[64\] is not contiguous"):
        _call(index=torch.zeros(128).int()[::2])
    _, packed, scales = weight(4, 64, 4)
    options: dict[str, Any] = {"bits": 4, "in_features": 64, "x_bits": 4}
    assert "weight_scales is on meta" in str(native.refuses(x, packed, scales.to("meta"), **options))


# The benchmark


def test_benchmark_entries_and_no_speed_when_parity_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth_gbps", lambda: 10.0)
    small = bench.Shape(96, 256, 2, traffic_bytes=1 << 16)
    entries = int_bench.int_matmul_bench([small], [(4, 8)])
    assert [entry["system"] for entry in entries] == ["trimtab/int-w4a8", "torch/bf16-linear"]
    assert {entry["bench"] for entry in entries} == {"int-matmul"}
    assert "int-matmul" in bench.BENCHMARKS
    right = int_bench.int_matmul
    monkeypatch.setattr(int_bench, "int_matmul", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(NumericsError, match="speed is not reported"):
        int_bench.int_matmul_bench([small], [(4, 8)])
