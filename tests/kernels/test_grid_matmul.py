"""grid_matmul: every backend and instruction set against the definition in float64."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from trimtab.core.errors import ConfigError, KernelUnavailable
from trimtab.kernels import library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.grid_matmul import GRID_MATMUL, grid_matmul, native
from trimtab.kernels.grid_matmul.reference import dequantize, grid_matmul_reference

from .conftest import KINDS, Grid, inputs, make_grid, needs_native, relative_rms
from .interpreted import needs_triton, run_interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# width, group size: blocks and tails of every number of bits, groups that are and are not whole chunks of 32
SHAPES = [(1, -1), (7, 7), (64, 32), (480, 96), (336, 48), (704, 64), (1000, -1), (1072, 16), (1536, 128), (2048, 512)]


CASES = [(bits, kind) for bits in (2, 3, 4, 8) for kind in KINDS if bits < 8 or "levels" not in kind]


def exact(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return x.double() @ grid.weight().T


def product(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return native.grid_matmul_native(x, [grid.given])[0]


@pytest.mark.parametrize(("bits", "kind"), CASES)
@pytest.mark.parametrize(("width", "group_size"), [(7, 7), (96, 48), (1000, -1)])
def test_reference_is_the_definition(bits: int, kind: str, width: int, group_size: int) -> None:
    grid = make_grid(5, width, bits, group_size, kind)
    x = inputs(3, width, torch.float32)
    weight = dequantize(grid.given)
    if kind in ("symmetric", "zeros"):
        assert torch.equal(weight, grid.weight().float())
    torch.testing.assert_close(weight.double(), grid.weight(), rtol=3e-7, atol=1e-7)
    assert relative_rms(grid_matmul_reference(x, [grid.given])[0], exact(x, grid)) < RMS_BOUND[torch.float32]


@needs_native
@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_native_parity(isa: str, bits: int, kind: str) -> None:
    for width, group_size in SHAPES:
        grid = make_grid(13, width, bits, group_size, kind)
        dense = dequantize(grid.given)
        for dtype in DTYPES:
            found = native.dequantize_native(grid.given, dtype)
            if bits == 8 and kind == "fractional" and dtype != torch.float32:  # a float32 rounding elsewhere
                torch.testing.assert_close(found.float(), dense, rtol=2**-8, atol=2**-12)
            else:
                assert torch.equal(found, dense.to(dtype)), (width, group_size, dtype)
        for rows in (1, 2, 3, 5, 8, 24, 64, 65):
            for dtype in DTYPES if rows in (1, 3, 8, 24) else DTYPES[:2]:
                x = inputs(rows, width, dtype)
                found = product(x, grid)
                assert found.dtype == dtype
                error = relative_rms(found, exact(x, grid))
                assert error <= RMS_BOUND[dtype], (width, group_size, rows, dtype)


@needs_native
def test_every_number_of_rows() -> None:
    for kind in ("fractional", "row_levels"):
        grid = make_grid(21, 352, 4, 32, kind)
        x = inputs(70, 352, torch.bfloat16)
        for rows in range(1, 71):
            assert relative_rms(product(x[:rows], grid), exact(x[:rows], grid)) <= RMS_BOUND[torch.bfloat16], rows


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_rounded_to_bfloat16_at_most(bits: int) -> None:
    grid = make_grid(33, 704, bits, 64, "levels")
    grid = Grid(grid.codes, replace(grid.given, levels=torch.randn(2**bits)))
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float32, 2**-21)):
        x = inputs(5, 704, dtype)
        bound = 2 * step * (x.double().abs() @ grid.weight().abs().T)
        assert ((product(x, grid) - exact(x, grid)).abs() <= bound).all(), dtype


@needs_native
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("zero_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_native_parameter_dtypes_and_leading_axes(scale_dtype: torch.dtype, zero_dtype: torch.dtype, rows: int) -> None:
    grid = make_grid(9, 192, 4, 64, "fractional", scale_dtype=scale_dtype, zero_dtype=zero_dtype)
    x = inputs(2 * rows, 192, torch.float32).reshape(2, rows, 192)
    found = product(x, grid)
    assert found.shape == (2, rows, 9)
    assert relative_rms(found, exact(x, grid)) <= RMS_BOUND[torch.float32]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    for bits in (2, 3, 4, 8):
        for kind in ("fractional", "row_levels") if bits < 8 else ("fractional",):
            grid = make_grid(37, 704, bits, 64, kind)
            x = inputs(41, 704, dtype)
            alone = torch.stack([product(row, grid) for row in x[:12]])
            assert torch.equal(product(x[:12], grid), alone), (bits, kind)
            assert torch.equal(product(x, grid)[:19], product(x[:19], grid)), (bits, kind)  # panels of another width


@needs_native
@pytest.mark.parametrize("rows", [9, 40])
def test_threads_do_not_change_results(rows: int) -> None:
    grid = make_grid(517, 704, 3, 64)
    x = inputs(rows, 704, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(x, grid))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, bad: float) -> None:
    for width, position in ((1072, 3), (1072, 1071), (40, 39)):
        for dtype in DTYPES[:2]:
            grid = make_grid(5, width, 3, -1, "zeros")
            x = inputs(3, width, dtype)
            x[1, position] = bad
            found = product(x, grid)
            assert not torch.isfinite(found[1]).any()
            assert torch.isfinite(found[[0, 2]]).all()


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty

    def poisoned(*shape: object, **options: object) -> torch.Tensor:
        tensor = plain(*shape, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for out, rows in ((1, 1), (3, 2), (7, 7), (33, 12), (9, 33), (9, 65)):
        for kind in ("symmetric", "fractional", "levels"):
            grid = make_grid(out, 100, 4, -1, kind)
            for dtype in DTYPES:
                x = inputs(rows, 100, dtype)
                assert relative_rms(product(x, grid), exact(x, grid)) <= RMS_BOUND[dtype]


@needs_triton
def test_triton_parity_under_its_interpreter() -> None:
    code = """
import torch
from kernels.conftest import KINDS, inputs, make_grid, relative_rms
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.grid_matmul import grid_matmul_many
cases = [(7, 7, 1, 2), (96, 48, 3, 3), (704, 64, 1, 4), (704, 64, 9, 3), (1000, -1, 2, 3), (80, 16, 17, 8)]
for width, group_size, rows, bits in cases:
    grids = [make_grid(37, width, bits, group_size, kind) for kind in KINDS if bits < 8 or "levels" not in kind]
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(rows, width, dtype)
        for grid, found in zip(grids, grid_matmul_many(x, [grid.given for grid in grids])):
            error = relative_rms(found, x.double() @ grid.weight().T)
            assert error <= RMS_BOUND[dtype], (width, group_size, rows, bits, grid.given, dtype, error)
"""
    run_interpreted(code)


# Dispatch


def _call(**changes: object) -> torch.Tensor:
    given = {"x": inputs(1, 64, torch.float32)} | vars(make_grid(4, 64, 4, 32).given) | changes
    return grid_matmul(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 63)}, r"x ends in \[63\], .* in_features=64"),
        ({"group_size": 48}, "group_size=48 does not divide in_features=64"),
        ({"group_size": 64}, r"scales are \[4, 2\]; .* take \[4, 1\]"),
        ({"bits": 8}, r"take uint8 \[out, 64\]"),
        ({"bits": 5}, "bits=5"),
        ({"zeros": torch.zeros(4, 2, dtype=torch.int8)}, "zeros are torch.int8"),
        ({"scales": torch.ones(4, 2, dtype=torch.uint8)}, "scales are torch.uint8"),
        ({"levels": torch.zeros(8)}, r"levels are torch.float32 \[8\]; 4 bits take float32 \[16\], or \[4, 16\]"),
        ({"levels": torch.zeros(5, 16)}, r"levels are torch.float32 \[5, 16\]"),
        ({"levels": torch.zeros(16).half()}, "levels are torch.float16"),
        ({"levels": torch.zeros(16), "zeros": torch.zeros(4, 2)}, "levels and zeros exclude each other"),
        ({"levels": torch.zeros(256), "bits": 8, "packed": torch.zeros(4, 64, dtype=torch.uint8)}, "not 8"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, r"zeros are \[4, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _call(**changes)


def test_forced_reference_and_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    assert _call().shape == (1, 4)
    monkeypatch.setenv("TRIMTAB_KERNELS", "nativ")
    with pytest.raises(ConfigError, match="Did you mean 'native'"):
        _call()


@needs_native
def test_forced_backend_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 64, dtype=torch.float64)
    assert _call(x=x).dtype == torch.float64  # by choice: the reference
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="x is torch.float64"):
        _call(x=x)
    with pytest.raises(KernelUnavailable, match="a gradient is wanted"):
        _call(x=torch.zeros(1, 64, requires_grad=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_forced_triton_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRIMTAB_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match="no CUDA device"):
        _call()


@needs_native
def test_instruction_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_ISA", "avx3")
    with pytest.raises(ConfigError, match="Did you mean 'avx2'"):
        _call()


def test_gradients_come_from_the_reference() -> None:
    x = inputs(2, 64, torch.float32).requires_grad_()
    _call(x=x).sum().backward()
    grid = make_grid(4, 64, 4, 32)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], grid.weight().sum(0).float())


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    GRID_MATMUL._logged.clear()
    with caplog.at_level(logging.INFO, logger="trimtab.kernels"):
        _call()
        _call()
    assert len(caplog.messages) == len(set(caplog.messages)) > 0


def test_without_the_library_the_reference_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_opened", lambda: (None, "the native library was not built"))
    library.absent.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="trimtab.kernels"):
            assert _call().shape == (1, 4)
            _call()
        assert sum("was not built" in message for message in caplog.messages) == 1
        monkeypatch.setenv("TRIMTAB_KERNELS", "native")
        with pytest.raises(KernelUnavailable, match="was not built"):
            _call()
    finally:
        library.absent.cache_clear()
