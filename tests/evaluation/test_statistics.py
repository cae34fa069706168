"""Intervals cover what they promise; tests keep their level. Full simulations carry the slow marker."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.core.errors import DataError
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def test_wilson_known_values() -> None:
    assert statistics.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert statistics.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for k, n in [(3, 17), (50, 100), (499, 500)]:
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert statistics.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("n", [30, 100, 500])
def test_wilson_coverage_is_exact_binomial_sum(n: int) -> None:
    intervals = np.array([statistics.wilson(k, n) for k in range(n + 1)])
    grid = np.linspace(0.001, 0.999, 999)
    inside = (intervals[:, :1] <= grid) & (grid <= intervals[:, 1:])
    coverage = (stats.binom.pmf(np.arange(n + 1)[:, None], n, grid) * inside).sum(axis=0)
    assert 0.945 <= coverage.mean() <= 0.96
    assert coverage[(grid >= 0.1) & (grid <= 0.9)].min() >= 0.91


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_proportion_without_clusters_is_wilson(outcomes: list[bool]) -> None:
    found = statistics.proportion([float(x) for x in outcomes])
    assert (found.low, found.high) == pytest.approx(statistics.wilson(sum(outcomes), len(outcomes)), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_clusters_of_copies_count_once() -> None:
    rng = np.random.default_rng(0)
    one_each = rng.integers(0, 2, 60).astype(float)
    copies = np.repeat(one_each, 5)
    names = [f"c{i // 5}" for i in range(300)]
    for estimate in (statistics.proportion, statistics.mean):
        alone, repeated = estimate(one_each), estimate(copies, names)
        assert repeated.low == pytest.approx(alone.low, abs=0.004)
        assert repeated.high == pytest.approx(alone.high, abs=0.004)
        naive = estimate(copies)
        assert naive.high - naive.low < 0.6 * (repeated.high - repeated.low)


def test_perfect_scores_in_clusters_are_judged_by_the_number_of_clusters() -> None:
    assert statistics.proportion([1.0] * 40, [i // 8 for i in range(40)]).low == pytest.approx(
        statistics.wilson(5, 5)[0]
    )


def _coverage(runs: int, seed: int, make) -> float:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    return float(np.mean([covers(*make(rng, r)) for r in range(runs)]))


def mean_case(rng: np.random.Generator, run: int) -> tuple[Estimate, float]:
    return statistics.mean(rng.gamma(2.0, 1.0, 500)), 2.0


def ratio_case(rng: np.random.Generator, run: int) -> tuple[Estimate, float]:
    size = rng.integers(500, 1500, 500).astype(float)
    return statistics.ratio_of_sums(size * rng.normal(2.0, 0.4, 500), size, seed=run, resamples=400), 2.0


def clustered_case(rng: np.random.Generator, run: int) -> tuple[Estimate, float]:
    names = np.repeat(np.arange(50), 10)
    return statistics.mean(rng.normal(0, 1, 50)[names] + rng.normal(0, 1, 500), names.tolist()), 0.0


def paired_case(rng: np.random.Generator, run: int) -> tuple[Estimate, float]:
    shared = rng.normal(0, 1, 500)
    a, b = shared + rng.normal(0, 0.3, 500), shared + 0.1 + rng.normal(0, 0.3, 500)
    return statistics.mean(b - a), 0.1


CASES = [mean_case, ratio_case, clustered_case, paired_case]


@pytest.mark.parametrize("make", CASES)
def test_coverage_quick(make) -> None:  # type: ignore[no-untyped-def]
    # 1,000 runs: the standard deviation of the coverage is 0.7 %; five of them around 95 %.
    assert 0.915 <= _coverage(1000, 1, make) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("make", CASES)
def test_coverage_full(make) -> None:  # type: ignore[no-untyped-def]
    assert 0.93 <= _coverage(8000, 2, make) <= 0.97


def test_bootstrap_agrees_with_the_vectorised_ratio() -> None:
    rng = np.random.default_rng(3)
    size = rng.integers(1, 9, 120).astype(float)
    top, names = size * rng.normal(1, 0.3, 120), [i // 4 for i in range(120)]
    fast = statistics.ratio_of_sums(top, size, names)
    slow = statistics.bootstrap(lambda a, b: a.sum() / b.sum(), top, size, clusters=names)
    assert slow.value == fast.value
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high), abs=0.01)
    assert slow == statistics.bootstrap(lambda a, b: a.sum() / b.sum(), top, size, clusters=names)  # seeded


def test_a_ratio_without_denominators_in_some_resamples_is_unbounded_above() -> None:
    found = statistics.ratio_of_sums([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    assert (found.value, found.high) == (2.0, math.inf)
    assert found.to_dict()["high"] is None
    with pytest.raises(DataError, match="sum to zero"):
        statistics.ratio_of_sums([1.0], [0.0])


def test_bootstrap_keeps_strata_sizes() -> None:
    column, strata = [0.0] * 30 + [1.0] * 10, ["a"] * 30 + ["b"] * 10
    kept = statistics.bootstrap(np.mean, column, strata=strata, resamples=50)
    assert (kept.low, kept.high) == (0.25, 0.25)
    free = statistics.bootstrap(np.mean, column, resamples=50)
    assert free.low < 0.25 < free.high
    with pytest.raises(DataError, match="two strata"):
        statistics.bootstrap(np.mean, column, strata=strata, clusters=["x"] * 40)


def test_mcnemar_and_holm_known_values() -> None:
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    ranked = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)


def _detections(runs: int, effect: float) -> float:
    """Share of simulated runs whose paired p-value is below 5 %; unit noise, 200 documents."""
    rng = np.random.default_rng(11)
    return float(np.mean([statistics.paired_t(rng.normal(effect, 1, 200)) < 0.05 for _ in range(runs)]))


def test_power_and_level() -> None:
    effect = statistics.minimum_detectable_effect(np.random.default_rng(0).normal(0, 1, 200))
    assert effect == pytest.approx(0.2, rel=0.1)
    assert _detections(1000, 0.2) >= 0.78
    assert _detections(1000, 0.0) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_non_inferiority_uses_the_lower_bound() -> None:
    assert statistics.not_inferior(Estimate(-0.01, -0.018, 0.0, 100), 0.02)
    assert not statistics.not_inferior(Estimate(-0.01, -0.021, 0.0, 100), 0.02)


def test_refusals() -> None:
    for bad in ([], [math.nan], [[1.0]]):
        with pytest.raises(DataError):
            statistics.mean(bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="zeros and ones"):
        statistics.proportion([0.5])
    with pytest.raises(DataError, match="3 clusters for 2"):
        statistics.mean([1.0, 2.0], ["a", "b", "c"])
    assert statistics.mean([1.0]).high == math.inf
