"""Pairs of a head: their energy knows the bias and no position, and rows come in the order that the rotation wants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import NumericsError
from trimtab.weights._pruning.rotary_selection import best_pairs, pair_rows, pair_scores, projected_energy


def example(width: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [tokens, width] that are not centred, weight [rows, width], bias [rows]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=generator, dtype=torch.float64) + 0.7
    return x, torch.randn(rows, width, generator=generator).double(), torch.randn(rows, generator=generator).double()


@pytest.mark.parametrize("biased", [True, False])
def test_energy_is_the_mean_square_of_the_projection(biased: bool) -> None:
    x, weight, bias = example(10, 6)
    given = bias if biased else None
    energy = projected_energy(weight, given, x.T @ x / 300, x.mean(0))
    y = x @ weight.T + (bias if biased else 0)
    torch.testing.assert_close(energy, y.square().mean(0))


def test_energy_of_a_pair_is_the_same_at_every_position() -> None:
    y = torch.randn(50, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    angles = torch.rand(50, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 6
    first, second = y[:, :4], y[:, 4:]
    turned = torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )
    keys = torch.rand(1, 8, dtype=torch.float64)
    before, after = (pair_scores(rows.square().mean(0).view(1, 1, 8), keys, 8) for rows in (y, turned))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(y.square().mean(0), turned.square().mean(0), rtol=0.05)


def test_score_multiplies_keys_by_the_sum_over_queries() -> None:
    """Two KV heads with three queries each, eight dimensions of which six are rotated."""
    generator = torch.Generator().manual_seed(5)
    queries, keys = torch.rand(2, 3, 8, generator=generator), torch.rand(2, 8, generator=generator)
    scores = pair_scores(queries, keys, 6)
    assert scores.shape == (2, 3)
    for j in range(2):
        for p in range(3):
            of_queries = sum(float(queries[j, i, p] + queries[j, i, p + 3]) for i in range(3))
            assert float(scores[j, p]) == pytest.approx(float(keys[j, p] + keys[j, p + 3]) * of_queries, rel=1e-6)


def test_the_best_pairs_come_ascending_and_the_lower_of_equals_loses() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 0.0]])
    assert best_pairs(scores, 2).tolist() == [[0, 3], [1, 2]]
    assert best_pairs(scores, 4).tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(NumericsError, match="1 of 8 scores are NaN"):
        best_pairs(scores.where(scores != 5, torch.nan), 2)


def test_rows_of_two_heads_on_each_pair_set() -> None:
    """Heads of 10 dimensions, 8 rotated: pairs (0, 4) ... (3, 7), and 8, 9 stay."""
    pairs = torch.tensor([[0, 2], [1, 3]])
    keys = pair_rows(pairs, share=1, head_dim=10, rotary_dim=8)
    assert keys.tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 18, 19]
    queries = pair_rows(pairs, share=2, head_dim=10, rotary_dim=8).view(4, 6)
    assert queries[1].tolist() == [10, 12, 14, 16, 18, 19]
    assert queries[2].tolist() == [21, 23, 25, 27, 28, 29]
