"""Allocation: shares meet the budget exactly, follow the scores, and respect the cap."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from trimtab.core.errors import BudgetError, ConfigError, NumericsError
from trimtab.weights._pruning.allocation import softmax, uniform

layers = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 1000)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(layers=layers, share=st.floats(0.01, 0.79), temperature=st.sampled_from([1e-3, 0.05, 0.1, 1.0, 1e6]))
def test_shares_meet_the_budget_and_the_cap(layers: list[tuple[float, int]], share: float, temperature: float) -> None:
    scores = {str(i): score for i, (score, _) in enumerate(layers)}
    sizes = {str(i): float(size) for i, (_, size) in enumerate(layers)}
    shares = softmax(scores, sizes, share, temperature=temperature)
    spent = math.fsum(shares[name] * sizes[name] for name in sizes)
    assert spent == pytest.approx(share * sum(sizes.values()), rel=1e-9)
    assert all(0 <= own <= 0.8 + 1e-12 for own in shares.values())
    ordered = sorted(sizes, key=lambda name: scores[name])
    for a, b in itertools.pairwise(ordered):
        assert shares[a] >= shares[b] - 1e-12  # what matters more loses no more


def test_it_is_the_softmax_of_the_paper_where_no_layer_is_capped() -> None:
    scores, count, share = {"a": 0.1, "b": 0.2, "c": 0.4}, 3, 0.3
    found = softmax(scores, dict.fromkeys(scores, 7.0), share, temperature=0.5)
    weights = {name: math.exp(-score / 0.5) for name, score in scores.items()}
    for name, own in found.items():
        assert own == pytest.approx(count * share * weights[name] / sum(weights.values()))


def test_a_large_temperature_is_uniform_and_a_small_one_fills_the_least_important() -> None:
    scores, sizes = {"a": 0.1, "b": 0.2, "c": 0.4}, dict.fromkeys("abc", 5.0)
    hot = softmax(scores, sizes, 0.3, temperature=1e9)
    assert hot == pytest.approx(uniform(sizes, 0.3))
    cold = softmax(scores, sizes, 0.3, temperature=1e-4)
    assert cold == pytest.approx({"a": 0.8, "b": 0.1, "c": 0.0})


def test_budgets_that_cannot_be_are_refused() -> None:
    sizes = {"a": 1.0, "b": 2.0}
    scores = {"a": 0.1, "b": 0.2}
    with pytest.raises(BudgetError, match=r"0\.9 cannot be removed when no layer may lose more than 0\.8"):
        softmax(scores, sizes, 0.9, temperature=1.0)
    with pytest.raises(ConfigError, match="temperature=0"):
        softmax(scores, sizes, 0.5, temperature=0)
    with pytest.raises(ConfigError, match="not of the same layers"):
        softmax({"a": 0.1}, sizes, 0.5, temperature=1.0)
    with pytest.raises(NumericsError, match="not all finite"):
        softmax({"a": 0.1, "b": math.nan}, sizes, 0.5, temperature=1.0)
    for bad in ({}, {"a": 0.0}):
        with pytest.raises(ConfigError, match="at least one layer"):
            uniform(bad, 0.5)
    with pytest.raises(ConfigError, match=r"share of 1\.5"):
        uniform(sizes, 1.5)
