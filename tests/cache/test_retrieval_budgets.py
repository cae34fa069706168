"""Budgets: the arithmetic from scores to classes, capacities and bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.cache._retrieval.budgets import bits_per_head, capacities, full_heads
from trimtab.core.errors import BudgetError, ConfigError

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=2, max_size=24).filter(
    lambda w: len(w) % 2 == 0
)


def test_the_best_heads_are_full() -> None:
    scores, sums = torch.tensor([[0.0, 0.5], [0.5, 1.0]]), torch.tensor([[0.0, 0.5], [0.75, 1.0]])
    assert full_heads(scores, 0.0, sums).sum() == 0
    assert full_heads(scores, 0.25, sums).tolist() == [[False, False], [False, True]]
    assert full_heads(scores, 0.5, sums).tolist() == [[False, False], [True, True]]  # of equal ones the larger sum
    assert full_heads(scores, 0.5).tolist() == [[False, True], [False, True]]  # or the earlier
    assert full_heads(scores, 0.75, sums).tolist() == [[False, True], [True, True]]
    assert bool(full_heads(scores, 1.0).all())
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"full_fraction must be in \[0, 1\]"):
            full_heads(scores, wrong)


@given(weights=weights, mean=st.integers(0, 500), beta=st.floats(1.001, 50))
def test_capacities(weights: list[float], mean: int, beta: float) -> None:
    scores = torch.tensor(weights, dtype=torch.float64).view(2, -1)
    found = capacities(scores, mean, beta)
    count, given = len(weights), math.floor(mean / beta)
    assert found.shape == scores.shape
    assert int(found.sum()) == mean * count
    assert int(found.min()) >= mean - given
    total = sum(weights)
    for score, tokens in zip(weights, found.flatten().tolist(), strict=True):
        share = score / total if total else 1 / count
        assert abs(tokens - (mean - given + given * count * share)) < 1 + 1e-6
    order = sorted(range(count), key=lambda h: weights[h])
    ranked = [int(found.flatten()[h]) for h in order]
    assert all(a <= b + 1 for a, b in itertools.pairwise(ranked))


def test_beta_at_its_ends() -> None:
    scores = torch.tensor([[0.6, 0.2], [0.2, 0.0]], dtype=torch.float64)
    assert capacities(scores, 100, 1e9).tolist() == [[100, 100], [100, 100]]
    assert capacities(scores, 100, 1.0000001).tolist() == [[239, 80], [80, 1]]  # floor(99.99999) = 99 given
    assert capacities(scores, 100, 2).tolist() == [[170, 90], [90, 50]]


@given(weights=weights, mean=st.integers(0, 300), beta=st.floats(1.001, 50), above=st.integers(0, 200))
def test_what_a_head_cannot_use_goes_to_the_others(weights: list[float], mean: int, beta: float, above: int) -> None:
    scores = torch.tensor(weights, dtype=torch.float64).view(2, -1)
    found = capacities(scores, mean, beta, most=mean + above)
    assert int(found.sum()) == mean * len(weights)
    assert int(found.max()) <= mean + above
    assert int(found.min()) >= mean - math.floor(mean / beta)


def test_capacity_refusals() -> None:
    scores = torch.ones(1, 2)
    with pytest.raises(ConfigError, match="beta > 1, not 10 and 1"):
        capacities(scores, 10, 1.0)
    with pytest.raises(ConfigError, match="not negative"):
        capacities(-scores, 10, 2.0)
    with pytest.raises(ConfigError, match="finite"):
        capacities(scores * math.nan, 10, 2.0)
    with pytest.raises(BudgetError, match="most=10 is the least"):
        capacities(scores, 10, 2.0, most=9)


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    scale=st.floats(0.5, 2),
    slack=st.floats(0, 1),
)
def test_bits_fit_and_are_within_one_step_of_the_best(weights: list[float], scale: float, slack: float) -> None:
    """With errors that fall convexly: no worse than the best of all choices plus the largest single saving."""
    nbytes = {2: 20, 3: 28, 4: 36}
    errors = {bits: [scale * 4.0**-bits * (1 + h) for h in range(len(weights))] for bits in nbytes}
    budget = round(len(weights) * (20 + slack * 16))
    chosen = bits_per_head(weights, errors, nbytes, budget)

    def cost(choice: tuple[int, ...]) -> float:
        return sum(w * errors[b][h] for h, (w, b) in enumerate(zip(weights, choice, strict=True)))

    def size(choice: tuple[int, ...]) -> int:
        return sum(nbytes[b] for b in choice)

    assert size(chosen) <= budget
    best = min(cost(c) for c in itertools.product(nbytes, repeat=len(weights)) if size(c) <= budget)
    step = max(w * (errors[2][h] - errors[3][h]) for h, w in enumerate(weights))
    assert best - 1e-12 <= cost(chosen) <= best + step


def test_bits_at_the_ends_and_refusals() -> None:
    nbytes, errors = {2: 20, 4: 36}, {2: [1.0, 1.0], 4: [0.1, 0.1]}
    assert bits_per_head([1.0, 5.0], errors, nbytes, 72) == (4, 4)
    assert bits_per_head([1.0, 5.0], errors, nbytes, 71) == (2, 4)
    assert bits_per_head([0.0, 0.0], errors, nbytes, 72) == (2, 2)
    with pytest.raises(BudgetError, match="take 40 bytes at 2 bits; the budget is 39"):
        bits_per_head([1.0, 5.0], errors, nbytes, 39)
    with pytest.raises(ConfigError, match="errors are known for"):
        bits_per_head([1.0], errors, nbytes, 72)
