"""HQQ: its formulas, and that no group ends with a larger L_p error than round to nearest on the same grid."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.models.views import LinearView
from trimtab.tensors.grid import GroupGrid
from trimtab.weights.hqq import Hqq
from trimtab.weights.rtn import Rtn

Make = Callable[[Tensor], LinearView]


def grid_of(linear: LinearView, method: Hqq | Rtn) -> GroupGrid:
    (grid,) = method.compress(linear, None)[0].parts
    assert isinstance(grid, GroupGrid)
    return grid


def group_errors(grid: GroupGrid, weight: Tensor, p: float) -> Tensor:
    """sum |w - w~|^p of each group, [out, groups]."""
    return (grid.dequantize() - weight).reshape(*grid.scales.shape, -1).abs().pow(p).sum(dim=2)


def never_worse(linear_of: Make, weight: Tensor, method: Hqq) -> bool:
    rtn = Rtn(bits=method.bits, group_size=method.group_size, scale_dtype=method.scale_dtype)
    before, after = (group_errors(grid_of(linear_of(weight), m), weight, method.p) for m in (rtn, method))
    return bool((after <= before * (1 + 1e-6)).all())


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from((8, 32, -1)),
    p=st.sampled_from((0.4, 0.7, 1.0)),
    beta=st.sampled_from((0.1, 10.0, 1e4)),
    magnitude=st.sampled_from((1e-3, 1.0, 30.0)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_no_group_is_worse_than_rounding_to_nearest(
    linear_of: Make, bits: int, group_size: int, p: float, beta: float, magnitude: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = magnitude * torch.randn(7, 64, generator=generator) ** 3
    weight[2, :40] = 0
    assert never_worse(
        linear_of,
        weight,
        Hqq(bits=bits, group_size=group_size, p=p, beta=beta),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_check_notices_the_last_iterate(linear_of: Make, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """The authors' code keeps the last zero points."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits))
    method = Hqq(bits=bits)  # type: ignore[arg-type]
    assert never_worse(linear_of, weight, method)
    start = _start(weight, method)
    with monkeypatch.context() as broken:
        broken.setattr(torch, "where", lambda better, new, old: new)
        last, _ = method._search(*start)
    monkeypatch.setattr(Hqq, "_search", lambda self, *a: (last, 0))
    assert not never_worse(linear_of, weight, method)


def _start(weight: Tensor, method: Hqq) -> tuple[Tensor, Tensor, Tensor]:
    rtn = Rtn(bits=method.bits, group_size=method.group_size)
    scales, zeros = rtn.parameters(weight, None)
    assert zeros is not None
    return weight.reshape(*scales.shape, -1), scales[:, :, None], zeros.half()[:, :, None]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("magnitude", [0.05, 3.0])
def test_lowers_the_error_it_searches_for(linear_of: Make, bits: int, magnitude: float) -> None:
    """Of most groups, with weights of any size."""
    weight = magnitude * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rtn = group_errors(grid_of(linear_of(weight), Rtn(bits=bits)), weight, 0.7)  # type: ignore[arg-type]
    hqq = group_errors(grid_of(linear_of(weight), Hqq(bits=bits)), weight, 0.7)  # type: ignore[arg-type]
    assert float((hqq < rtn).float().mean()) > 0.5
    assert float(hqq.sum() / rtn.sum()) < {2: 0.99, 3: 0.99, 4: 0.995}[bits]


def one_step(weight: Tensor, bits: int, scale: Tensor, zero: Tensor, p: float, beta: float) -> Tensor:
    """The update in the authors' terms: `scale` divides where theirs multiplies; one group, in float64."""
    codes = (weight / scale + zero).round().clamp(0, 2**bits - 1)
    restored = (codes - zero) * scale
    difference = weight - restored
    shrunk = torch.sign(difference) * torch.relu(difference.abs() - difference.abs() ** (p - 1) / beta)
    return (codes - (weight - shrunk) / scale).mean()


@pytest.mark.parametrize("magnitude", [0.05, 5.0])
def test_one_iteration_is_the_published_update(linear_of: Make, magnitude: float) -> None:
    """Small weights, whose errors are all shrunk to nothing, and large ones, whose errors mostly stay."""
    weight = magnitude * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    method = Hqq(bits=2, iterations=1)
    start = _start(weight, method)
    grid = grid_of(linear_of(weight), method)
    moved = 0
    for row in range(32):
        scale, zero = start[1][row, 0, 0].double(), start[2][row, 0, 0].double()
        expected = one_step(weight[row].double(), 2, scale, zero, 0.7, 10.0)
        assert grid.zeros is not None
        found = float(grid.zeros[row, 0])
        moved += found != float(zero)
        assert found in (pytest.approx(float(expected), abs=2e-3), float(zero))
    assert moved > 10


def test_the_update_check_notices_errors_that_are_not_shrunk(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sign", lambda self: torch.zeros_like(self))
    with pytest.raises(AssertionError):
        test_one_iteration_is_the_published_update(linear_of, 5.0)


def test_without_iterations_it_is_rtn(linear_of: Make) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    hqq, rtn = grid_of(linear_of(weight), Hqq(bits=3, iterations=0)), grid_of(linear_of(weight), Rtn(bits=3))
    assert torch.equal(hqq.dequantize(), rtn.dequantize())
    assert hqq.nbytes == rtn.nbytes + 16  # a byte more for each zero point


def test_codes_are_nearest_for_the_zero_point_as_stored(linear_of: Make) -> None:
    grid = grid_of(linear_of(torch.randn(16, 64, generator=torch.Generator().manual_seed(0))), Hqq(bits=3))
    assert grid.zeros is not None
    assert grid.zeros.dtype == torch.float16
    assert bool((grid.zeros != grid.zeros.round()).any())
    assert torch.equal(grid.project(grid.dequantize()).codes(), grid.codes())
    grid.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, "p=0.0 must be above 0 and at most 1"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"kappa": 0.5}, "kappa=0.5 must be at least 1"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hqq(**options)  # type: ignore[arg-type]
