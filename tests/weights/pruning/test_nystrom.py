"""Scores of neurons: ridge leverage in the definition's order, and repair that is best for every choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.tensors.metric import Metric
from trimtab.weights._pruning.nystrom import energy_scores, ridge_scores
from trimtab.weights._pruning.repair import repair_ls


def hidden(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated rows [tokens, width] of very different energies."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    energies = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing * energies


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
def test_the_order_is_that_of_ridge_leverage_scores(ridge: float) -> None:
    x = hidden(200, 24)
    gram = x.T @ x / 200
    damping = ridge * float(gram.diagonal().mean())
    leverage = (gram @ torch.linalg.inv(gram + damping * torch.eye(24, dtype=torch.float64))).diagonal()
    scores = ridge_scores(gram, ridge)
    torch.testing.assert_close(1 - damping / scores, leverage, rtol=1e-8, atol=1e-8)
    assert torch.equal(scores.argsort(), leverage.argsort())


def test_a_small_ridge_scores_what_the_others_cannot_predict() -> None:
    x = hidden(400, 12)
    scores = ridge_scores(x.T @ x / 400, 1e-12)
    for i in range(12):
        others = torch.cat([x[:, :i], x[:, i + 1 :]], dim=1)
        left = x[:, i] - others @ torch.linalg.lstsq(others, x[:, i, None]).solution[:, 0]
        assert float(scores[i]) == pytest.approx(float(left.square().mean()), rel=1e-5)


def test_a_large_ridge_ranks_by_energy() -> None:
    x = hidden(200, 24)
    gram = x.T @ x / 200
    assert torch.equal(ridge_scores(gram, 1e6).argsort(), energy_scores(gram).argsort())


def test_energy_of_the_output_is_that_of_each_neuron_alone() -> None:
    x, down = hidden(100, 16), torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).double()
    alone = torch.stack([(x[:, i, None] * down[:, i]).square().sum(dim=1).mean() for i in range(16)])
    torch.testing.assert_close(energy_scores(x.T @ x / 100, down), alone)


@pytest.mark.parametrize("tokens", [200, 10])
def test_repair_is_never_worse_whatever_is_kept(tokens: int) -> None:
    """With fewer tokens than neurons too, where the Gram matrix is singular."""
    x = hidden(tokens, 24)
    gram = (x.T @ x / tokens).float()
    down = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    for seed in range(20):
        keep = torch.rand(24, generator=torch.Generator().manual_seed(seed)) < 0.6
        cut, repaired = torch.where(keep, down, 0.0), torch.zeros_like(down)
        repaired[:, keep] = repair_ls(down, gram, keep)
        metric = Metric.gram(gram)
        assert metric.squared_norm(repaired - down) < metric.squared_norm(cut - down)


def test_singular_and_empty_grams_have_finite_scores() -> None:
    x = hidden(5, 24)
    assert bool(torch.isfinite(ridge_scores(x.T @ x / 5, 1e-2)).all())
    assert not bool(ridge_scores(torch.zeros(8, 8), 1e-2).any())
    x[:, 3] = 0
    scores = ridge_scores(x.T @ x / 5, 1e-2)
    assert int(scores.argmin()) == 3
