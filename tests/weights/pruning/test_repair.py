"""Repair: least squares is the best for its support, the sweep comes close, neither moves a removed entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.models.statistics import Stats
from trimtab.tensors.metric import Metric
from trimtab.weights._pruning.repair import remove_by_sweep, repair_ls, repair_ls_rows
from trimtab.weights._pruning.selection import smallest_of_rows

Example = tuple[Tensor, Stats]


def gram_of(stats: Stats) -> Tensor:
    assert stats.gram is not None
    return stats.gram


def wanda_mask(weight: Tensor, gram: Tensor, count: int) -> Tensor:
    return ~smallest_of_rows(weight.abs() * gram.diagonal().sqrt(), count)


def swept(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    inverse = Metric.gram(gram).inverse_cholesky(1e-6)
    found = remove_by_sweep(
        weight, inverse, lambda start, block: ~keep.T[start : start + len(block)], choice_size=16, block_size=32
    )
    assert torch.equal(found.keep, keep)
    return found.weight


def error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    return Metric.gram(gram).relative_error(weight, other)


def test_the_best_weight_of_a_support_is_that_of_numpy_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 20, generator=generator, dtype=torch.float64) @ torch.randn(
        20, 20, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(5, 20, generator=generator)
    gram = (x.T @ x / 300).float()
    keep = torch.arange(20) % 3 != 0
    shared = repair_ls(weight, gram, keep, damp=1e-9)
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.double().T).solution.T
    torch.testing.assert_close(shared.double(), expected, rtol=1e-4, atol=1e-4)
    rows = repair_ls_rows(weight, gram, keep.expand(5, 20), damp=1e-9)
    torch.testing.assert_close(rows[:, keep], shared, rtol=1e-4, atol=1e-4)
    assert not bool(rows[:, ~keep].any())


@pytest.mark.parametrize("count", [32, 64, 96])
def test_least_squares_beats_the_sweep_and_the_sweep_beats_nothing(correlated: Example, count: int) -> None:
    weight, stats = correlated
    gram = gram_of(stats)
    keep = wanda_mask(weight, gram, count)
    plain = error(weight, torch.where(keep, weight, 0), gram)
    sweep = error(weight, swept(weight, gram, keep), gram)
    best = error(weight, repair_ls_rows(weight, gram, keep), gram)
    assert best < sweep < plain
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # a minimum: every small step away from it is worse
        step = torch.where(keep, torch.randn(weight.shape, generator=generator), 0) * 1e-2
        assert error(weight, repair_ls_rows(weight, gram, keep) + step, gram) > best


def test_costs_are_those_of_weights_that_hold_all_earlier_corrections(correlated: Example) -> None:
    """The costs shown for the second half of the columns are those of what removing from the first half leaves."""
    weight, stats = correlated
    inverse = Metric.gram(gram_of(stats)).inverse_cholesky()
    shown: dict[int, Tensor] = {}

    def first_half(start: int, costs: Tensor) -> Tensor:
        shown[start] = costs.clone()
        return (torch.arange(len(costs))[:, None] % 2 == start // 64 * 2).expand(costs.shape)  # of the second: nothing

    found = remove_by_sweep(weight, inverse, first_half, choice_size=64, block_size=64)
    corrected, keep = found.weight, found.keep
    assert bool(keep[:, 64:].all())
    pivots = inverse.factor.diagonal().square()
    torch.testing.assert_close(shown[0].T, weight[:, :64].square() / pivots[:64])
    torch.testing.assert_close(shown[64].T, corrected[:, 64:].square() / pivots[64:], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(shown[64].T, weight[:, 64:].square() / pivots[64:], rtol=0.1)


def test_the_broken_variant_that_solves_with_the_whole_gram_is_worse(correlated: Example) -> None:
    weight, stats = correlated
    gram = gram_of(stats)
    keep = torch.arange(128) % 2 == 0
    wrong = (weight @ gram[:, keep]) @ torch.linalg.inv(gram.double())[keep][:, keep].float()
    whole = torch.zeros_like(weight)
    whole[:, keep] = repair_ls(weight, gram, keep)
    broken = torch.zeros_like(weight)
    broken[:, keep] = wrong
    assert error(weight, whole, gram) < error(weight, torch.where(keep, weight, 0), gram) < error(weight, broken, gram)


def test_inputs_that_are_not_correlated_change_nothing() -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    gram = torch.diag(torch.arange(1.0, 13.0))
    assert torch.equal(repair_ls_rows(weight, gram, keep), torch.where(keep, weight, 0))
    assert torch.equal(repair_ls(weight, gram, keep[0]), weight[:, keep[0]])


def test_what_is_kept_of_everything_is_everything() -> None:
    weight = torch.randn(6, 12)
    gram = torch.eye(12) + 0.3
    assert torch.equal(repair_ls_rows(weight, gram, torch.ones(6, 12, dtype=torch.bool)), weight)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_singular_grams_are_damped(scale: float) -> None:
    weight = torch.randn(4, 8)
    gram = torch.ones(8, 8) * scale
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    repaired = repair_ls_rows(weight, gram, keep)
    assert bool(torch.isfinite(repaired).all())
    assert not bool(repaired[~keep].any())
    assert bool(torch.isfinite(repair_ls(weight, gram, keep[0])).all())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"wants a Gram matrix \[8, 8\] and a bool mask \[8\]"):
        repair_ls(torch.ones(4, 8), torch.ones(7, 7), torch.ones(8, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"bool mask \[4, 8\]"):
        repair_ls_rows(torch.ones(4, 8), torch.eye(8), torch.ones(8, dtype=torch.bool))


def test_scales_of_a_sweep_do_not_see_what_is_removed() -> None:
    weight = torch.full((3, 130), 0.75)
    weight[:, [5, 129]] = 100.0
    removed = (torch.arange(130) == 5).expand(3, 130)
    found = remove_by_sweep(
        weight,
        Metric.gram(torch.eye(130)).inverse_cholesky(1e-6),
        lambda start, block: removed.T[start : start + len(block)],
        choice_size=64,
        block_size=64,
        rounded_group=64,
    )
    assert found.scales is not None
    torch.testing.assert_close(found.scales[0].float(), torch.tensor([0.1, 0.1, 13.3]), rtol=0.01, atol=0)
    steps = found.scales.float().repeat_interleave(64, dim=1)[:, :130]
    assert bool(((found.weight - weight).abs() <= 0.54 * steps)[found.keep].all())
    assert torch.equal(found.keep, ~removed)
