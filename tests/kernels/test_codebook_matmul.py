"""codebook_matmul: every backend and instruction set against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable, NumericsError
from trimtab.kernels import bench, library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.codebook_matmul import bench as codebook_bench
from trimtab.kernels.codebook_matmul import codebook_matmul, native
from trimtab.kernels.codebook_matmul.reference import codebook_matmul_reference, dequantize

from .conftest import inputs, needs_native, relative_rms
from .guarded import run_guarded
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# g, M, B
KINDS = [(4, 1, 8), (4, 3, 5), (8, 1, 8), (8, 2, 8), (8, 1, 12), (8, 2, 16), (16, 1, 8), (16, 4, 9), (4, 1, 16)]


def weight(
    out: int, groups: int, g: int, books: int, code_bits: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, codebooks, scales); the codes' first and last values occur."""
    generator = torch.Generator().manual_seed(g + books)
    codes = torch.randint(0, 2**code_bits, (out, groups, books), generator=generator)
    codes[0, 0], codes[-1, -1] = 0, 2**code_bits - 1
    codebooks = torch.randn(books, 2**code_bits, g, generator=generator).half()
    return (
        codes.to(torch.uint8 if code_bits <= 8 else torch.int16),
        codebooks,
        (torch.rand(out, generator=generator) + 0.1).to(scale_dtype),
    )


def exact(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """float64 [out, in], by the definition."""
    books, entries, _ = codebooks.shape
    rows = [[sum(codebooks[m, int(code[m]) % entries].double() for m in range(books)) for code in row] for row in codes]
    return torch.stack([torch.cat(row) for row in rows]) * scales.double()[:, None]  # type: ignore[arg-type]


@pytest.mark.parametrize(("g", "books", "code_bits"), [*KINDS, (2, 2, 4), (3, 1, 1)])
def test_reference_is_the_definition(g: int, books: int, code_bits: int) -> None:
    codes, codebooks, scales = weight(5, 7, g, books, code_bits)
    dense = exact(codes, codebooks, scales)
    torch.testing.assert_close(dequantize(codes, codebooks, scales), dense.float(), rtol=1e-6, atol=1e-6)
    x = inputs(3, 7 * g, torch.float32)
    found = codebook_matmul_reference(x, codes, codebooks, scales, in_features=7 * g)
    assert relative_rms(found, x.double() @ dense.T) < RMS_BOUND[torch.float32]


@needs_native
@pytest.mark.parametrize(("g", "books", "code_bits"), KINDS)
def test_native_parity(isa: str, g: int, books: int, code_bits: int) -> None:
    for out, groups in ((1, 1), (13, 5), (19, 33)):
        codes, codebooks, scales = weight(out, groups, g, books, code_bits)
        dense = dequantize(codes, codebooks, scales)
        for dtype in DTYPES:
            assert torch.equal(native.dequantize_native(codes, codebooks, scales, dtype), dense.to(dtype))
        for rows in (1, 2, 4, 5, 16, 17):
            x = inputs(rows, groups * g, DTYPES[rows % 3])
            found = native.codebook_matmul_native(x, codes, codebooks, scales, in_features=groups * g)
            assert found.dtype == x.dtype
            assert relative_rms(found, x.double() @ dense.double().T) <= RMS_BOUND[x.dtype], (out, groups, rows)


@needs_native
@pytest.mark.parametrize(("g", "books", "code_bits"), [(8, 1, 8), (4, 2, 10), (16, 1, 8)])
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, g: int, books: int, code_bits: int) -> None:
    arguments = weight(517, 40, g, books, code_bits)
    x = inputs(native.MAX_ROWS, 40 * g, torch.float32)
    alone = torch.stack([native.codebook_matmul_native(row, *arguments, in_features=40 * g) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (2, 7, 16):
                found = native.codebook_matmul_native(x[:rows], *arguments, in_features=40 * g)
                assert torch.equal(found, alone[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, bad: float) -> None:
    arguments = weight(9, 6, 8, 2, 8)
    for position in (0, 47):
        x = inputs(3, 48, torch.bfloat16)
        x[1, position] = bad
        found = native.codebook_matmul_native(x, *arguments, in_features=48)
        assert not torch.isfinite(found[1]).any()
        assert torch.isfinite(found[[0, 2]]).all()


@needs_native
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scale_dtypes_strides_and_leading_axes(scale_dtype: torch.dtype) -> None:
    arguments = weight(9, 8, 8, 1, 8, scale_dtype)
    x = inputs(64, 6, torch.float32).T.reshape(2, 3, 64)
    for case in (x, x.transpose(0, 1), x[0, 0], x[:0], inputs(4, 128, torch.float32)[:, ::2]):
        found = codebook_matmul(case, *arguments, in_features=64)
        assert found.shape == (*case.shape[:-1], 9)
        if found.numel():
            expected = codebook_matmul_reference(case, *arguments, in_features=64)
            assert relative_rms(found, expected) <= RMS_BOUND[torch.float32]


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out, rows in ((1, 1), (3, 2), (9, 7), (33, 8), (301, 1), (300, 17)):
        codes, codebooks, scales = weight(out, 5, 8, 1, 8)
        x = inputs(rows, 40, torch.float32)
        assert torch.isfinite(native.codebook_matmul_native(x, codes, codebooks, scales, in_features=40)).all()


@pytest.mark.parametrize("isa", library.ISAS)
def test_native_touches_no_other_memory(isa: str) -> None:
    code = """
import torch
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.codebook_matmul import native
for at_end in (True, False):
    for g, books, bits, dtype in ((4, 1, 8, torch.uint8), (8, 2, 7, torch.uint8), (16, 1, 9, torch.int16)):
        codes = fenced(torch.full((11, 3, books), 2**bits - 1, dtype=dtype), at_end)
        codebooks = fenced(torch.randn(books, 2**bits, g).half(), at_end)
        scales = fenced(torch.ones(11).half(), at_end)
        for rows in (1, 5, 17):
            x = fenced(torch.randn(rows, 3 * g).bfloat16(), at_end)
            with fenced_outputs(at_end):
                native.codebook_matmul_native(x, codes, codebooks, scales, in_features=3 * g)
        areas.clear()
"""
    run_guarded(code, isa)


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import inputs, relative_rms
from kernels.test_codebook_matmul import KINDS, weight
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.codebook_matmul import codebook_matmul
from trimtab.kernels.codebook_matmul.reference import dequantize
for number, (g, books, bits) in enumerate(KINDS):
    arguments = weight(37, 11, g, books, bits)
    x = inputs((1, 3, 9)[number % 3], 11 * g, (torch.float32, torch.bfloat16)[number % 2])
    found = codebook_matmul(x, *arguments, in_features=11 * g)
    error = relative_rms(found, x.double() @ dequantize(*arguments).double().T)
    assert error <= RMS_BOUND[x.dtype], (g, books, bits, error)
"""
    run_interpreted(code)


# Dispatch


def _call(**changes: Any) -> Tensor:
    codes, codebooks, scales = weight(4, 8, 8, 2, 8)
    given = {"x": inputs(1, 64, torch.float32), "codes": codes, "codebooks": codebooks, "scales": scales}
    return codebook_matmul(**(given | {"in_features": 64} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 63)}, r"x ends in \[63\], .* in_features=64"),
        ({"codes": torch.zeros(4, 8, 2)}, "codes are torch.float32"),
        ({"codes": torch.zeros(4, 8, 1, dtype=torch.uint8)}, r"codes are \[4, 8, 1\]; .* take \[out, 8, 2\]"),
        ({"codebooks": torch.zeros(2, 512, 8).half()}, r"\[2, 512, 8\]; torch.uint8 codes .* at most 256 vectors"),
        ({"codebooks": torch.zeros(2, 256, 8)}, "codebooks are torch.float32"),
        ({"codebooks": torch.zeros(2, 100, 8).half()}, "100 vectors; their number must be a power of two"),
        ({"codebooks": torch.zeros(2, 256, 7).half()}, "7 numbers do not divide in_features=64"),
        ({"scales": torch.ones(3)}, r"scales are \[3\]; .* take \[4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _call(**changes)


def test_gradients_come_from_the_reference() -> None:
    codes, codebooks, scales = weight(4, 8, 8, 2, 8)
    x = inputs(2, 64, torch.float32).requires_grad_()
    codebook_matmul(x, codes, codebooks, scales, in_features=64).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], dequantize(codes, codebooks, scales).sum(0))


@needs_native
def test_forced_backend_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    assert _call(x=x).dtype == torch.float64  # by choice: the reference
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="x is torch.float64"):
        _call(x=x)
    with pytest.raises(KernelUnavailable, match="a gradient is wanted"):
        _call(x=torch.zeros(1, 64, requires_grad=True))
    codes, codebooks, scales = weight(4, 32, 2, 1, 8)
    with pytest.raises(KernelUnavailable, match="vectors have 2 numbers"):
        _call(codes=codes, codebooks=codebooks, scales=scales)
    with pytest.raises(KernelUnavailable, match="codes of shape .* not contiguous"):
        _call(codes=torch.zeros(4, 2, 8, dtype=torch.uint8).transpose(1, 2))


# The benchmark


def test_benchmark_entries_and_no_speed_when_parity_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth_gbps", lambda: 10.0)
    small = bench.Shape(96, 256, 2, traffic_bytes=1 << 16)
    entries = codebook_bench.codebook_matmul_bench([small], [(8, 2, 8), (4, 1, 10)])
    assert [entry["system"] for entry in entries] == [
        "trimtab/codebook-2x8-g8",
        "trimtab/codebook-1x10-g4",
        "torch/bf16-linear",
    ]
    assert {entry["bench"] for entry in entries} == {"codebook-matmul"}
    assert "codebook-matmul" in bench.BENCHMARKS
    right = codebook_bench.codebook_matmul
    monkeypatch.setattr(codebook_bench, "codebook_matmul", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(NumericsError, match="speed is not reported"):
        codebook_bench.codebook_matmul_bench([small], [(8, 2, 8), (4, 1, 10)])
