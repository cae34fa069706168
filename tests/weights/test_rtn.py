"""Round to nearest: the formulas, and what clipping guarantees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView
from trimtab.tensors import grid_search
from trimtab.tensors.grid import GridFormat, GroupGrid, grid_parameters, quantize_codes
from trimtab.tensors.grid_search import range_parameters
from trimtab.weights import rtn
from trimtab.weights.rtn import Rtn

from .conftest import stats_of

Make = Callable[[Tensor], LinearView]
formats = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([8, 16, -1]),
        "symmetric": st.booleans(),
        "scale_dtype": st.sampled_from(["float16", "float32", "bfloat16"]),
    }
)


def grid_of(linear: LinearView, method: Rtn, stats: Stats | None = None) -> GroupGrid:
    tensor, notes = method.compress(linear, stats)
    assert notes == {}
    (grid,) = tensor.parts
    assert isinstance(grid, GroupGrid)
    return grid


def steps(grid: GroupGrid) -> Tensor:
    """The scale of every weight, [out, in]."""
    return grid.scales.float().repeat_interleave(grid.in_features // grid.scales.shape[1], dim=1)


def within_half_a_step(grid: GroupGrid, weight: Tensor) -> bool:
    """Whether every weight with a code that is not at an end is at most half a step off."""
    codes = grid.codes()
    inside = (codes > 0) & (codes < grid.format.levels - 1)
    return bool(((grid.dequantize() - weight).abs() <= steps(grid) / 2 * (1 + 1e-5))[inside].all())


@given(options=formats, seed=st.integers(0, 50))
def test_compressing_the_result_again_changes_nothing(linear_of: Make, options: dict, seed: int) -> None:
    """Idempotent where the full range is used: the second grid is the first."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    method = Rtn(**{**options, "scale_dtype": "float32"})
    once = grid_of(linear_of(weight), method)
    fixed = once.dequantize()
    again = once.project(fixed)
    assert torch.equal(again.codes(), once.codes())


@given(options=formats, seed=st.integers(0, 50))
def test_error_is_at_most_half_a_step_inside_the_range(linear_of: Make, options: dict, seed: int) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    grid = grid_of(linear_of(weight), Rtn(**options))
    assert within_half_a_step(grid, weight)
    step, error = steps(grid), (grid.dequantize() - weight).abs()
    # at the ends: the stored scale may be a rounding too small, and a symmetric maximum clips by half a step
    assert bool((error <= step * (1.01 if options["symmetric"] else 0.51) + 0.01 * weight.abs()).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_formula(linear_of: Make, bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.4, 0.1, 0.0], [0.5, 0.25, -0.125, 0.3]])
    grid = grid_of(linear_of(weight), Rtn(bits=bits, group_size=-1, symmetric=True, scale_dtype="float32"))
    scale = torch.tensor([[1.0], [0.5]]) / ((2**bits - 1) / 2)
    codes = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.testing.assert_close(grid.scales, scale)
    torch.testing.assert_close(grid.dequantize(), codes * scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_formula_forces_zero_into_the_range(linear_of: Make, bits: int) -> None:
    weight = torch.tensor([[0.2, 0.4, 0.9, 0.3], [-0.5, 0.25, -0.125, 0.3]])
    grid = grid_of(linear_of(weight), Rtn(bits=bits, group_size=-1, scale_dtype="float32"))
    scale = torch.tensor([[0.9], [0.8]]) / (2**bits - 1)
    zero = torch.tensor([[0.0], [0.5]]).div(scale).round()
    torch.testing.assert_close(grid.scales, scale)
    assert torch.equal(grid.zeros.float(), zero)
    torch.testing.assert_close(grid.dequantize(), ((weight / scale).round() + zero - zero) * scale)


@given(options=formats, seed=st.integers(0, 30))
def test_clipping_never_raises_a_groups_error(linear_of: Make, options: dict, seed: int) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) ** 3
    linear = linear_of(weight)

    def group_errors(clip: str) -> Tensor:
        grid = grid_of(linear, Rtn(**options, clip=clip))
        error = (grid.dequantize() - weight).abs() ** 2.4
        return error.view(4, grid.scales.shape[1], -1).sum(-1)

    assert bool((group_errors("mse") <= group_errors("none") * (1 + 1e-6)).all())


def test_clipping_helps_where_a_weight_stands_out(linear_of: Make) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 5] = 5.0
    errors = [
        float((grid_of(linear_of(weight), Rtn(bits=3, clip=clip)).dequantize() - weight).abs().pow(2.4).sum())
        for clip in ("none", "mse")
    ]
    assert errors[1] < 0.9 * errors[0]


def test_imatrix_lowers_the_error_of_the_output(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    errors = []
    for clip in ("none", "imatrix"):
        method = Rtn(bits=3, clip=clip)
        assert method.needs == ({"second_moment"} if clip == "imatrix" else set())
        error = grid_of(linear_of(weight), method, stats).dequantize() - weight
        errors.append(float((error.square() * stats.second_moment).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_imatrix_weighs_by_the_second_moment(linear_of: Make) -> None:
    """With all activity in one column, that column is kept best."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x = torch.full((10, 32), 1e-3)
    x[:, 7] = 10
    plain, weighted = (
        (grid_of(linear_of(weight), Rtn(bits=2, group_size=-1, clip=clip), stats_of(x)).dequantize() - weight)[:, 7]
        for clip in ("none", "imatrix")
    )
    assert float(weighted.norm()) < 0.5 * float(plain.norm())


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_stay_zero(linear_of: Make, symmetric: bool) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 8:16] = 0
    weight[2] = 0
    grid = grid_of(linear_of(weight), Rtn(group_size=8, symmetric=symmetric))
    assert bool((grid.dequantize()[weight == 0] == 0).all())
    assert bool((grid.scales > 0).all())


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # relative mean squared error on Gaussian weights
        ({"bits": 4, "group_size": 128, "symmetric": True}, 0.01226),
        ({"bits": 4, "group_size": 32, "symmetric": True}, 0.00899),
        ({"bits": 4, "group_size": 128}, 0.01008),
        ({"bits": 3, "group_size": 128, "symmetric": True}, 0.05621),
        ({"bits": 3, "group_size": 128}, 0.04633),
        ({"bits": 2, "group_size": 128, "symmetric": True}, 0.302),
        ({"bits": 2, "group_size": 128}, 0.252),
    ],
)
def test_golden_errors(linear_of: Make, options: dict, expected: float) -> None:
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    error = grid_of(linear_of(weight), Rtn(**options)).dequantize() - weight
    assert float(error.square().sum() / weight.square().sum()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_on_the_stored_grid(linear_of: Make, bits: int) -> None:
    """Scales are rounded to the dtype in which they are stored before codes are computed."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    grid = grid_of(linear_of(weight), Rtn(bits=bits, scale_dtype="bfloat16"))
    assert torch.equal(grid.project(weight).codes(), grid.codes())


# Broken variants: each of the checks above notices one.


def test_half_a_step_notices_truncation(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> Tensor:
        return quantize_codes(weight - 0.5 * scales.float().repeat_interleave(16, dim=1), scales, zeros, fmt)

    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert within_half_a_step(grid_of(linear_of(weight), Rtn(bits=4, group_size=16)), weight)
    monkeypatch.setattr(rtn, "quantize_codes", truncated)
    assert not within_half_a_step(grid_of(linear_of(weight), Rtn(bits=4, group_size=16)), weight)


def test_the_stored_grid_notices_scales_rounded_afterwards(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> Tensor:
        unrounded, _ = grid_parameters(weight, replace(fmt, scale_dtype="float32"))
        return quantize_codes(weight, unrounded, zeros, fmt)

    monkeypatch.setattr(rtn, "quantize_codes", early)
    with pytest.raises(AssertionError):
        test_codes_are_the_nearest_on_the_stored_grid(linear_of, 8)


@pytest.mark.parametrize("check", [test_symmetric_formula, test_asymmetric_formula_forces_zero_into_the_range])
def test_the_formulas_notice_another_number_of_steps(
    linear_of: Make, monkeypatch: pytest.MonkeyPatch, check: Callable[[Make, int], None]
) -> None:
    """2^b steps, or a symmetric maximum on code 7 of 4 bits (divisor 7 and not 7.5), are another grid."""

    def one_step_fewer(low: Tensor, high: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
        scales, zeros = range_parameters(low, high, fmt)
        return scales * (fmt.levels - 1) / (fmt.levels - 2), zeros

    monkeypatch.setattr(grid_search, "range_parameters", one_step_fewer)
    with pytest.raises(AssertionError):
        check(linear_of, 4)


def test_the_formula_notices_a_range_without_zero(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_zero(values: Tensor, fmt: GridFormat, *search: object) -> tuple[Tensor, Tensor | None]:
        return range_parameters(values.amin(dim=1), values.amax(dim=1), fmt)

    monkeypatch.setattr(grid_search, "group_parameters", without_zero)
    with pytest.raises(AssertionError):
        test_asymmetric_formula_forces_zero_into_the_range(linear_of, 4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_inputs_are_rounded_per_token_on_request(linear_of: Make, symmetric: bool) -> None:
    """4 bits: 16 levels between a token's ends, or 15 around zero; the weights are the same as without."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)) + 0.5
    plain = Rtn(group_size=16, symmetric=symmetric).compress(linear_of(weight), None)[0]
    tensor = Rtn(group_size=16, symmetric=symmetric, activation_bits=4).compress(linear_of(weight), None)[0]
    assert torch.equal(tensor.dequantize(), plain.dequantize())
    assert tensor.nbytes == plain.nbytes
    assert tensor.transform is not None
    seen = tensor.transform.apply(x)
    torch.testing.assert_close(tensor.matmul(x), seen @ plain.dequantize().T)
    width = x.abs().amax(1) / 7 if symmetric else (x.amax(1) - x.amin(1)) / 15
    assert float(((seen - x).abs().amax(1) / width).max()) <= 1.0  # half a step, and half a step of the zero point
    assert max(len(row.unique()) for row in seen) <= (15 if symmetric else 16)
