"""sparse_matmul: every backend and instruction set against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable, NumericsError
from trimtab.kernels import bench, library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.sparse_matmul import SparseWeight, native, sparse_matmul, sparse_matmul_many
from trimtab.kernels.sparse_matmul import bench as sparse_bench
from trimtab.kernels.sparse_matmul.bitmap import (
    code_bytes,
    pack_bits,
    pack_codes,
    row_offsets,
    unpack_bits,
    unpack_codes,
)
from trimtab.kernels.sparse_matmul.prepared import prepared_sparse
from trimtab.kernels.sparse_matmul.reference import dequantize, sparse_matmul_reference

from .conftest import inputs, needs_native, relative_rms
from .guarded import run_guarded
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = torch.uint8
STORED = [*DTYPES, CODES]
SHAPES = [(1, 1), (5, 7), (13, 64), (9, 65), (33, 200), (6, 1001)]
SHARES = [0.5, 0.1, 0.0, 1.0]
UNEQUAL = [(300, 0.5), (3, 0.0), (40, 1.0), (90, 0.3)]


def sparse(out: int, width: int, share: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, SparseWeight]:
    """(the dense weight, float64; the same, stored). The first and last rows keep all, one in the middle nothing.

    CODES in place of a dtype: codes of 4 bits, in groups of 128 columns."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(out, width, generator=generator) < share
    if 0 < share < 1 and out > 4:
        keep[0], keep[-1], keep[out // 2] = True, True, False
    if dtype == CODES:
        codes = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
        scales = (torch.rand(out, -(-width // 128), generator=generator) + 0.5).bfloat16()
        dense = codes * scales.double().repeat_interleave(128, dim=1)[:, :width]
        offsets = row_offsets(code_bytes(keep)).int()
        weight = SparseWeight(pack_bits(keep), pack_codes(codes, keep), offsets, width, scales, 128)
    else:
        stored = torch.randn(out, width, generator=generator).to(dtype)
        dense = stored.double()
        weight = SparseWeight(pack_bits(keep), stored[keep], row_offsets(keep.sum(1)).int(), width)
    return torch.where(keep, dense, 0), weight


def multiplied(x: Tensor, weight: SparseWeight) -> Tensor:
    """By the native kernel."""
    return native.sparse_matmul_native(x, (weight,))[0]


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


def test_codes_of_a_word_begin_a_new_byte() -> None:
    mask = torch.zeros(2, 130, dtype=torch.bool)
    mask[0, [0, 5, 63, 64]] = mask[1, [128, 129]] = True
    codes = torch.full((2, 130), 5, dtype=torch.int8)
    codes[mask] = torch.tensor([1, -1, 7, -8, 2, 3], dtype=torch.int8)
    packed = pack_codes(codes, mask)
    assert packed.tolist() == [0xF1, 0x07, 0x08, 0x32]
    assert code_bytes(mask).tolist() == [3, 1]


@given(rows=st.integers(0, 5), columns=st.integers(1, 200), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_codes_round_trip(rows: int, columns: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < share
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, mask), mask), torch.where(mask, codes, 0))


# Parity


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("share", SHARES)
def test_reference_is_the_definition(dtype: torch.dtype, share: float) -> None:
    for out, width in SHAPES:
        dense, weight = sparse(out, width, share, dtype)
        assert torch.equal(dequantize(weight).double(), dense)
        x = inputs(3, width, torch.float32)
        found, expected = sparse_matmul_reference(x, (weight,))[0], x.double() @ dense.T
        assert float((found - expected).norm()) <= RMS_BOUND[torch.float32] * float(expected.norm())


@needs_native
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", STORED)
def test_native_parity(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Outputs are rounded once: within half a unit in the last place, and the little that float32 sums lose."""
    unit = torch.finfo(x_dtype).eps
    for out, width in SHAPES:
        for share in SHARES:
            dense, weight = sparse(out, width, share, dtype)
            for rows in range(1, native.MAX_ROWS + 1):
                x = inputs(rows, width, x_dtype)
                found, expected = multiplied(x, weight), x.double() @ dense.T
                assert found.dtype == x_dtype
                assert found.shape == (rows, out)
                error, size = float((found - expected).norm()), float(expected.norm())
                assert error <= RMS_BOUND[x_dtype] * size, (out, width, share, rows)
                lost = 1e-6 * (x.double().abs() @ dense.abs().T + 1)
                assert ((found - expected).abs() <= unit / 2 * expected.abs() + lost).all(), (out, width, share, rows)


@needs_native
@pytest.mark.parametrize("dtype", STORED)
def test_many_rows_go_by_written_out_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(native, "BLOCK_WEIGHTS", 2000)
    dense, weight = sparse(33, 200, 0.4, dtype)
    for out_dtype in DTYPES:
        buffer = torch.full((5, 200), torch.nan, dtype=out_dtype)
        assert torch.equal(native.write_out(weight, 7, buffer), dense[7:12].to(out_dtype))
        x = inputs(native.MAX_ROWS + 9, 200, out_dtype)
        rounded = dense.to(out_dtype).double()
        assert relative_rms(multiplied(x, weight), x.double() @ rounded.T) <= RMS_BOUND[out_dtype]


@needs_native
@pytest.mark.parametrize("dtype", STORED)
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, dtype: torch.dtype) -> None:
    weight = sparse(517, 352, 0.5, dtype)[1]
    x = inputs(native.MAX_ROWS, 352, torch.bfloat16 if dtype == CODES else dtype)
    alone = torch.stack([multiplied(row, weight) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, native.MAX_ROWS + 1):
                found = multiplied(x[:rows], weight)
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
            stored = SparseWeight(pack_bits(keep), weight[keep], row_offsets(keep.sum(1)).int(), 640)
            x = inputs(2, 640, torch.float32)
            expected = x.double() @ torch.where(keep, weight, 0).double().T
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found = multiplied(x, stored)
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype, bad: float) -> None:
    """Also in rows that do not keep the column, as in the dense product."""
    weight = sparse(9, 80, 0.5, dtype)[1]
    for position in (3, 79):
        x = inputs(3, 80, torch.bfloat16 if dtype == CODES else dtype)
        x[1, position] = bad
        for found in (multiplied(x, weight), sparse_matmul_reference(x, (weight,))[0]):
            assert not torch.isfinite(found[1]).any()
            assert torch.isfinite(found[[0, 2]]).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_axes(dtype: torch.dtype) -> None:
    weight = sparse(9, 64, 0.5, torch.bfloat16)[1]
    x = inputs(64, 6, dtype).T.reshape(2, 3, 64)
    wide = inputs(4, 128, dtype)[:, ::2]
    for case in (x, x.transpose(0, 1), wide, x[0, 0], x[:0], wide[2:].expand(2, 2, 64), wide[2:].expand(5, 2, 64)):
        found = sparse_matmul(case, weight)
        assert found.shape == (*case.shape[:-1], 9)
        assert torch.equal(found, sparse_matmul(case.clone(memory_format=torch.contiguous_format), weight))
    empty = SparseWeight(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0), torch.zeros(1, dtype=torch.int32), 64)
    assert sparse_matmul(x, empty).shape == (2, 3, 0)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_weights_of_one_input_in_one_call(isa: str, threads: int) -> None:
    """Bit for bit what each gives alone, whatever they hold and however unequal they are."""
    weights = [sparse(out, 130, share, dtype)[1] for (out, share), dtype in zip(UNEQUAL, STORED, strict=True)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows in (1, 3, native.MAX_ROWS, 11):
            x = inputs(rows, 130, torch.bfloat16)
            found = sparse_matmul_many(x, weights)
            for one, weight in zip(found, weights, strict=True):
                assert torch.equal(one, multiplied(x, weight))
            with torch.no_grad():
                prepared = prepared_sparse(weights)
                assert prepared.accepts(x) == (rows <= 8)
                if rows <= 8:
                    assert all(map(torch.equal, prepared.run(x), found))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out in (1, 3, 7, 33, 301):
        for dtype in (torch.bfloat16, CODES):
            weight = sparse(out, 144, 0.3, dtype)[1]
            for rows in (1, 2, 5, 8, 11):
                assert torch.isfinite(multiplied(inputs(rows, 144, torch.bfloat16), weight)).all()


@pytest.mark.parametrize("isa", library.ISAS)
def test_native_touches_no_other_memory(isa: str) -> None:
    code = """
from dataclasses import replace
import torch
from conftest import inputs
from guarded import areas, fenced, fenced_outputs
from kernels.test_sparse_matmul import STORED, multiplied, sparse
for at_end in (True, False):
    for width, share in ((1, 1.0), (64, 0.5), (65, 0.03), (200, 0.5), (1001, 1.0)):
        for dtype in STORED:
            for out, rows in ((1, 1), (5, 3), (9, 8), (3, 11)):
                weight, x = sparse(out, width, share, dtype)[1], inputs(rows, width, torch.bfloat16)
                plain = multiplied(x, weight)
                moved = {name: fenced(t, at_end) for name, t in weight.tensors().items() if t.numel()}
                with fenced_outputs(at_end):
                    assert torch.equal(multiplied(fenced(x, at_end), replace(weight, **moved)), plain)
                areas.clear()
"""
    run_guarded(code, isa)


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import inputs, relative_rms
from kernels.test_sparse_matmul import DTYPES, STORED, sparse
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.sparse_matmul import sparse_matmul
for number, (out, width, rows) in enumerate(((1, 7, 1), (13, 64, 3), (33, 129, 9), (5, 200, 2), (37, 70, 17))):
    for dtype in (STORED[number % 3], STORED[3]):
        dense, weight = sparse(out, width, (0.5, 1.0, 0.3)[number % 3], dtype)
        x = inputs(rows, width, DTYPES[(number + number // 3) % 3])
        error = relative_rms(sparse_matmul(x, weight), x.double() @ dense.T)
        assert error <= RMS_BOUND[x.dtype], (out, width, rows, dtype, error)
assert not sparse_matmul(x, sparse(37, 70, 0.0, torch.float32)[1]).any()
"""
    run_interpreted(code)


# Dispatch


def _call(x: Tensor | None = None, **changes: Any) -> Tensor:
    weight = replace(sparse(4, 70, 1.0, torch.float16)[1], **changes)
    return sparse_matmul(inputs(1, 70, torch.float32) if x is None else x, weight)


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
        ({"scales": torch.zeros(4, 2), "group_size": 64}, "codes are torch.float16"),
        ({"values": torch.zeros(8, dtype=CODES), "scales": torch.zeros(4, 2), "group_size": 32}, "group_size=32 must"),
        (
            {"values": torch.zeros(8, dtype=CODES), "scales": torch.zeros(4, 2), "group_size": 64},
            r"scales are torch.float32 \[4, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _call(**changes)
    with pytest.raises(ConfigError, match="at least one"):
        sparse_matmul_many(torch.zeros(1, 70), ())
    with pytest.raises(ConfigError, match=r"equal in_features, not \[70, 71\]"):
        sparse_matmul_many(torch.zeros(1, 70), [sparse(4, width, 1.0, CODES)[1] for width in (70, 71)])


def test_gradients_come_from_the_reference() -> None:
    dense, weight = sparse(9, 70, 0.5, torch.float32)
    x = inputs(2, 70, torch.float32).requires_grad_()
    values = weight.values.clone().requires_grad_()
    sparse_matmul(x, replace(weight, values=values)).sum().backward()
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
        "trimtab/sparse-50%-kept+4bit",
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
