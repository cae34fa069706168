"""GPTQ: the invariants of the method, each also shown to notice a broken variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView
from trimtab.tensors.grid import GroupGrid
from trimtab.tensors.metric import InverseCholesky, Metric
from trimtab.weights.gptq import Gptq
from trimtab.weights.rtn import Rtn

from .conftest import stats_of

Make = Callable[[Tensor], LinearView]
Notes = dict[str, Any]
GROUPINGS: list[dict[str, Any]] = [
    {"group_size": 32},
    {"group_size": -1},
    {"group_size": 32, "static_groups": True},
    {"group_size": 32, "act_order": True},
    {"group_size": 32, "symmetric": True, "clip": "mse"},
]
groupings = pytest.mark.parametrize("options", GROUPINGS, ids=str)


def solve(linear: LinearView, stats: Stats, **options: Any) -> tuple[GroupGrid, Notes]:
    tensor, notes = Gptq(**options).compress(linear, stats)
    (grid,) = tensor.parts
    assert isinstance(grid, GroupGrid)
    return grid, notes


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    return Metric.gram(gram).relative_error(weight, approximation)


def without_compensation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant: U is reduced to its diagonal, so no error is pushed on."""
    right = Metric.inverse_cholesky

    def diagonal(self: Metric, damp: float = 0.01) -> InverseCholesky:
        found = right(self, damp)
        return InverseCholesky(found.factor.diagonal().diag(), found.damping, found.dead)

    monkeypatch.setattr(Metric, "inverse_cholesky", diagonal)


def with_transposed_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant: the Cholesky factor of H^-1 is taken of H."""
    right = Metric.inverse_cholesky

    def of_h(self: Metric, damp: float = 0.01) -> InverseCholesky:
        found = right(self, damp)
        assert self.matrix is not None
        return InverseCholesky(torch.linalg.cholesky(self.matrix.double()).T.float(), found.damping, found.dead)

    monkeypatch.setattr(Metric, "inverse_cholesky", of_h)


# (i) uncorrelated inputs of equal strength: nothing to compensate


@groupings
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_rtn_for_an_identity_gram(linear_of: Make, bits: int, options: dict[str, Any]) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(bits))
    linear = linear_of(weight)
    grid, _ = solve(linear, Stats("s", 1, gram=3 * torch.eye(96)), bits=bits, **options)
    shared = {k: v for k, v in options.items() if k in ("group_size", "symmetric", "clip")}
    (expected,) = Rtn(bits=bits, **shared).compress(linear, None)[0].parts
    assert isinstance(expected, GroupGrid)
    for name, buffer in expected.state().items():
        assert torch.equal(grid.state()[name], buffer), name


# (ii) correlated inputs: lower output error than rounding


@groupings
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rtn_on_correlated_inputs(
    linear_of: Make, correlated: tuple[Tensor, Stats], bits: int, options: dict[str, Any]
) -> None:
    weight, stats = correlated
    shared = {k: v for k, v in options.items() if k in ("group_size", "symmetric", "clip")}
    nearest = Rtn(bits=bits, **shared).compress(linear_of(weight), None)[0].dequantize()
    grid, _ = solve(linear_of(weight), stats, bits=bits, **options)
    assert output_error(weight, grid.dequantize(), stats.gram) < 0.75 * output_error(weight, nearest, stats.gram)
    assert grid.nbytes == Rtn(bits=bits, **shared).compress(linear_of(weight), None)[0].nbytes


@pytest.mark.parametrize("broken", [without_compensation, with_transposed_factor])
def test_beating_rtn_notices_a_broken_variant(
    linear_of: Make, correlated: tuple[Tensor, Stats], monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None]
) -> None:
    weight, stats = correlated
    nearest = Rtn(bits=3, group_size=32).compress(linear_of(weight), None)[0].dequantize()
    broken(monkeypatch)
    grid, _ = solve(linear_of(weight), stats, bits=3, group_size=32)
    assert output_error(weight, grid.dequantize(), stats.gram) > 0.99 * output_error(weight, nearest, stats.gram)


# (iii) the block size changes the speed only


@groupings
def test_block_size_does_not_change_the_result(
    linear_of: Make, correlated: tuple[Tensor, Stats], options: dict[str, Any]
) -> None:
    weight, stats = correlated
    whole, notes = solve(linear_of(weight), stats, bits=3, block_size=1000, **options)
    expected = output_error(weight, whole.dequantize(), stats.gram)
    for block_size in (1, 7, 16, 50, 128):
        grid, other = solve(linear_of(weight), stats, bits=3, block_size=block_size, **options)
        assert output_error(weight, grid.dequantize(), stats.gram) == pytest.approx(expected, rel=1e-4)
        assert other["gptq_loss"] == pytest.approx(notes["gptq_loss"], rel=1e-4)


def test_block_size_check_notices_groups_of_stale_weights(
    linear_of: Make, correlated: tuple[Tensor, Stats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If blocks were not cut where a group begins, its range would come from weights not yet corrected."""
    weight, stats = correlated
    monkeypatch.setattr(Gptq, "_block_end", lambda self, start, width, length: min(start + self.block_size, width))
    errors = {
        output_error(
            weight, solve(linear_of(weight), stats, bits=3, group_size=32, block_size=size)[0].dequantize(), stats.gram
        )
        for size in (50, 128)
    }
    assert max(errors) > (1 + 1e-4) * min(errors)


# (iv) act-order with static groups does not depend on how channels are numbered


@given(seed=st.integers(0, 20))
@settings(max_examples=10)
def test_act_order_does_not_depend_on_the_order_within_groups(
    linear_of: Make, correlated: tuple[Tensor, Stats], seed: int
) -> None:
    """Permuting whole groups, and channels inside them, permutes weight, H and the group map together."""
    weight, stats = correlated
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(4, generator=generator)
    order = torch.cat([32 * g + torch.randperm(32, generator=generator) for g in groups])
    moved = Stats("s", 1, gram=stats.gram[order][:, order])
    options = {"bits": 3, "group_size": 32, "act_order": True}
    expected, _ = solve(linear_of(weight), stats, **options)
    found, _ = solve(linear_of(weight[:, order]), moved, **options)
    a = output_error(weight, expected.dequantize(), stats.gram)
    assert output_error(weight[:, order], found.dequantize(), moved.gram) == pytest.approx(a, rel=1e-3)
    same = (found.codes() == expected.codes()[:, order]).float().mean()
    assert float(same) > 0.99  # a rounding at a tie may fall the other way


def test_order_check_notices_the_left_to_right_order(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    order = torch.arange(127, -1, -1)
    moved = Stats("s", 1, gram=stats.gram[order][:, order])
    options = {"bits": 3, "group_size": 32, "static_groups": True}
    expected, _ = solve(linear_of(weight), stats, **options)
    found, _ = solve(linear_of(weight[:, order]), moved, **options)
    assert float((found.codes() == expected.codes()[:, order]).float().mean()) < 0.9


def test_act_order_helps_with_outlier_channels(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    errors = [
        output_error(weight, solve(linear_of(weight), stats, bits=3, act_order=a)[0].dequantize(), stats.gram)
        for a in (False, True)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_act_order_means_static_groups(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    (expected,) = Rtn(bits=3, group_size=32).compress(linear_of(weight), None)[0].parts
    assert isinstance(expected, GroupGrid)
    for options in ({"act_order": True}, {"static_groups": True}, {"act_order": True, "static_groups": True}):
        grid, _ = solve(linear_of(weight), stats, bits=3, group_size=32, **options)
        assert torch.equal(grid.scales, expected.scales)
    dynamic, _ = solve(linear_of(weight), stats, bits=3, group_size=32)
    assert not torch.equal(dynamic.scales, expected.scales)
    assert torch.equal(dynamic.scales[:, 0], expected.scales[:, 0])  # nothing was corrected before the first


# (v) codes lie on the stored grid


@groupings
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_codes_lie_on_the_stored_grid(
    linear_of: Make, correlated: tuple[Tensor, Stats], options: dict[str, Any], scale_dtype: str
) -> None:
    weight, stats = correlated
    grid, _ = solve(linear_of(weight), stats, bits=3, scale_dtype=scale_dtype, **options)
    assert torch.equal(grid.project(grid.dequantize()).codes(), grid.codes())
    grid.check()


# the loss tracker is the objective


@groupings
def test_the_reported_loss_is_the_damped_objective(
    linear_of: Make, correlated: tuple[Tensor, Stats], options: dict[str, Any]
) -> None:
    """Sum of e_i^2 = tr(D (H + damping) D^T): true of the column-wise solution only if every step is right."""
    weight, stats = correlated
    grid, notes = solve(linear_of(weight), stats, bits=3, **options)
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(128)
    objective = Metric.gram(damped).squared_norm(grid.dequantize() - weight)
    assert 2 * notes["gptq_loss"] == pytest.approx(objective, rel=1e-3)


@pytest.mark.parametrize("broken", [without_compensation, with_transposed_factor])
def test_the_loss_check_notices_a_broken_variant(
    linear_of: Make, correlated: tuple[Tensor, Stats], monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None]
) -> None:
    weight, stats = correlated
    broken(monkeypatch)
    grid, notes = solve(linear_of(weight), stats, bits=3, group_size=32)
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(128)
    objective = Metric.gram(damped).squared_norm(grid.dequantize() - weight)
    assert 2 * notes["gptq_loss"] != pytest.approx(objective, rel=0.05)


def test_the_scale_of_the_activations_does_not_matter(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    gram = stats.gram.clone()
    gram[5, :] = gram[:, 5] = 0  # with a dead column, whose diagonal is replaced
    grids = [
        solve(linear_of(weight), Stats("s", 1, gram=scale * gram), bits=3)[0] for scale in (1.0, 2.0**-20, 2.0**20)
    ]
    assert torch.equal(grids[0].codes(), grids[1].codes())
    assert torch.equal(grids[0].codes(), grids[2].codes())


def test_the_weight_of_the_model_is_not_changed(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    linear = linear_of(weight)
    solve(linear, stats)
    assert torch.equal(linear.weight, weight)


# degenerate statistics


@groupings
def test_dead_columns_become_zero_and_are_counted(
    linear_of: Make, correlated: tuple[Tensor, Stats], options: dict[str, Any]
) -> None:
    weight, _ = correlated
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(3))
    dead = [0, 17, 127]
    x[:, dead] = 0
    grid, notes = solve(linear_of(weight), stats_of(x), bits=4, **options)
    assert notes["dead_columns"] == 3
    assert "fallback" not in notes
    result = grid.dequantize()
    assert bool((result[:, dead] == 0).all())
    assert output_error(weight, result, stats_of(x).gram) < 0.03


def test_inputs_that_are_never_active_fall_back_to_rtn(linear_of: Make) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid, notes = solve(linear_of(weight), Stats("s", 5, gram=torch.zeros(64, 64)))
    (expected,) = Rtn().compress(linear_of(weight), None)[0].parts
    assert isinstance(expected, GroupGrid)
    assert torch.equal(grid.codes(), expected.codes())
    assert notes == {"fallback": "rtn", "fallback_reason": "no input is ever active"}


def test_a_singular_gram_is_damped(linear_of: Make) -> None:
    """Fewer tokens than columns."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stats = stats_of(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))
    grid, notes = solve(linear_of(weight), stats, bits=3)
    assert notes["damping"] == 0.01
    nearest = Rtn(bits=3).compress(linear_of(weight), None)[0].dequantize()
    assert output_error(weight, grid.dequantize(), stats.gram) < output_error(weight, nearest, stats.gram)


@pytest.mark.parametrize(("smallest", "damping"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_grows_until_the_gram_is_definite(linear_of: Make, smallest: float, damping: float) -> None:
    """An indefinite matrix, as accumulated rounding would make it, by far exaggerated."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    gram = indefinite(smallest)
    _, notes = solve(linear_of(weight), Stats("s", 1, gram=gram), group_size=32)
    assert notes["damping"] == pytest.approx(damping)
    assert "fallback" not in notes


def test_a_gram_that_stays_indefinite_falls_back_to_rtn(linear_of: Make) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    grid, notes = solve(linear_of(weight), Stats("s", 1, gram=indefinite(-50.0)), group_size=32)
    (expected,) = Rtn(group_size=32).compress(linear_of(weight), None)[0].parts
    assert isinstance(expected, GroupGrid)
    assert torch.equal(grid.codes(), expected.codes())
    assert notes["fallback"] == "rtn"
    assert "not positive definite" in notes["fallback_reason"]


def indefinite(smallest: float) -> Tensor:
    """[32, 32] with ones on the diagonal and an eigenvalue of about `smallest`."""
    gram = torch.eye(32)
    gram[3, 20] = gram[20, 3] = 1 - smallest
    return gram


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percdamp": 0.0}, "percdamp=0.0 must be above 0"),
        ({"percdamp": 1.5}, "percdamp=1.5 must be above 0 and at most 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gptq(**options)
