"""half_linear: every instruction set against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.half_linear import MAX_ROWS, half_linear, native
from trimtab.kernels.half_linear.reference import half_linear_reference

from .conftest import inputs, needs_native, relative_rms

HALVES = [torch.bfloat16, torch.float16]
SIZES = [1, 7, 17, 33, 80, 352, 1001]


def layer(out: int, width: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    return inputs(out, width, dtype, seed=2), inputs(1, out, dtype, seed=3)[0] if bias else None


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_the_definition(dtype: torch.dtype, bias: bool) -> None:
    x, (weight, shift) = inputs(3, 80, dtype), layer(17, 80, dtype, bias)
    found = half_linear_reference(x, weight, shift)
    assert found.dtype == dtype
    assert relative_rms(found, exact(x, weight, shift)) < RMS_BOUND[dtype]


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_native_parity(isa: str, dtype: torch.dtype, bias: bool) -> None:
    """Outputs are rounded once: within half a unit in the last place, and the little that float32 sums lose."""
    unit = torch.finfo(dtype).eps
    for width in SIZES:
        for out in (1, 5, 17, 33):
            weight, shift = layer(out, width, dtype, bias)
            for rows in range(1, MAX_ROWS + 1):
                x = inputs(rows, width, dtype)
                found, expected = native.half_linear_native(x, weight, shift), exact(x, weight, shift)
                assert found.dtype == dtype
                assert found.shape == (rows, out)
                assert relative_rms(found, expected) <= RMS_BOUND[dtype], (width, out, rows)
                lost = 1e-6 * (x.double().abs() @ weight.double().abs().T + 1)
                assert ((found - expected).abs() <= unit / 2 * expected.abs() + lost).all(), (width, out, rows)


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, dtype: torch.dtype) -> None:
    weight, bias = layer(131, 352, dtype)
    x = inputs(MAX_ROWS, 352, dtype)
    alone = torch.stack([native.half_linear_native(row, weight, bias) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, MAX_ROWS + 1):
                assert torch.equal(native.half_linear_native(x[:rows], weight, bias), alone[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
def test_strides_and_leading_axes(dtype: torch.dtype) -> None:
    weight, bias = layer(9, 64, dtype)
    x = inputs(64, 6, dtype).T.reshape(2, 3, 64)
    wide = inputs(4, 128, dtype)[:, ::2]
    for case in (x, x.transpose(0, 1), wide, x[0, 0], x[:0], wide[2:].expand(2, 2, 64)):
        found = half_linear(case, weight, bias)
        assert found.shape == (*case.shape[:-1], 9)
        assert torch.equal(found, half_linear(case.clone(memory_format=torch.contiguous_format), weight, bias))
    assert half_linear(x, weight[:0], bias[:0] if bias is not None else None).shape == (2, 3, 0)
    assert torch.equal(half_linear(x[..., :0], weight[:, :0].contiguous(), bias), bias.expand(2, 3, 9))  # type: ignore[union-attr]


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype, bad: float) -> None:
    for position in (3, 79):
        weight, bias = layer(5, 80, dtype)
        x = inputs(3, 80, dtype)
        x[1, position] = bad
        found = native.half_linear_native(x, weight, bias)
        assert not torch.isfinite(found[1]).any()
        assert torch.isfinite(found[[0, 2]]).all()
    big = torch.full((1, 80), torch.finfo(dtype).max, dtype=dtype)
    assert native.half_linear_native(big, big).item() == float("inf")


@needs_native
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(float("nan")))
    for out in (1, 3, 7, 33, 301):
        for rows in range(1, MAX_ROWS + 1):
            weight, bias = layer(out, 144, torch.bfloat16)
            assert torch.isfinite(native.half_linear_native(inputs(rows, 144, torch.bfloat16), weight, bias)).all()


# Dispatch


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        (torch.zeros(1, 7), torch.zeros(4, 8), None, r"x ends in \[7\], but the weight is \[4, 8\]"),
        (torch.zeros(1, 8), torch.zeros(8), None, r"the weight is \[8\]; a linear takes \[out, in\]"),
        (torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(8), r"the bias is \[8\]; .* takes \[4\]"),
        (torch.zeros(1, 8), torch.zeros(4, 8).half(), None, "x is torch.float32, the weight torch.float16"),
        (torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(4).half(), "the bias torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, bias: Tensor | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        half_linear(x, weight, bias)


@needs_native
@pytest.mark.parametrize(
    ("rows", "dtype", "change", "words"),
    [
        (MAX_ROWS + 1, torch.bfloat16, lambda w: w, r"x of shape \[9, 16\] has more than 8 rows"),
        (1, torch.float32, lambda w: w, "the weight is torch.float32"),
        (1, torch.float16, lambda w: w.T.contiguous().T, r"weight of shape \[4, 16\], .* not contiguous"),
        (1, torch.float16, lambda w: w.requires_grad_(), "a gradient is wanted"),
    ],
)
def test_a_forced_backend_fails_where_a_free_choice_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, change: object, words: str
) -> None:
    x, weight = inputs(rows, 16, dtype), change(inputs(4, 16, dtype))  # type: ignore[operator]
    assert torch.equal(half_linear(x, weight), half_linear_reference(x, weight))
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match=words):
        half_linear(x, weight)


@needs_native
def test_other_devices_are_refused() -> None:
    x, weight = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    assert native.refuses(x, weight) is None
    assert "x is on meta and weight on cpu" in str(native.refuses(x.to("meta"), weight))
