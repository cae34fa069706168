"""Intervals and tests that every figure of trimtab goes through. All intervals are 95 % unless said otherwise.

An item is one document; items that share a cluster (windows of one text, questions about one context) are not
independent, so intervals resample or sum over clusters. Values are float64. A statistic of fewer than two items has
the interval [-inf, inf] (or [0, 1] for proportions): nothing is known about its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trimtab.core.errors import DataError
from trimtab.evaluation.base import Estimate

CONFIDENCE = 0.95
RESAMPLES = 2000

Array = NDArray[np.float64]
Clusters = Sequence[Hashable] | None


def _array(values: Sequence[float] | Array, name: str = "values") -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"statistics: {name} must be a non-empty list of numbers, but has shape {array.shape}.")
    if not np.isfinite(array).all():
        raise DataError(f"statistics: {name} has {int((~np.isfinite(array)).sum())} of {array.size} not finite.")
    return array


def _cluster_index(clusters: Clusters, n: int) -> NDArray[np.int64]:
    """Cluster number of each item; every item its own where there are no clusters or its cluster is None."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise DataError(f"statistics: {len(clusters)} clusters for {n} values.")
    numbers: dict[Hashable, int] = {}
    keys = ((i,) if cluster is None else cluster for i, cluster in enumerate(clusters))
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64, count=n)


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a proportion; `n` may be an effective sample size. Sensible at 0 and at 1.

    >>> wilson(0, 10)[1], wilson(10, 10)[0]  # doctest: +ELLIPSIS
    (0.277..., 0.722...)
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def _clustered_variance(values: Array, index: NDArray[np.int64]) -> tuple[float, int]:
    """Squared standard error of the mean over clusters, and the number of clusters C (at least 2).

    SE^2 = C / (C - 1) * sum_c (sum_{i in c} (s_i - mean))^2 / n^2, which is s^2 / n if every item is its own cluster.
    """
    sums = np.bincount(index, weights=values - values.mean())
    count = sums.size
    return float(count / (count - 1) * (sums**2).sum() / values.size**2), count


def proportion(values: Sequence[float] | Array, clusters: Clusters = None, undefined: int = 0) -> Estimate:
    """Share of ones among zeros and ones: Wilson, with n divided by the design effect of the clusters (at least 1)."""
    array = _array(values)
    if not np.isin(array, (0.0, 1.0)).all():
        raise DataError("statistics: a proportion is of zeros and ones; use mean() for other values.")
    p, n = float(array.mean()), array.size
    index = _cluster_index(clusters, n)
    effect = 1.0
    if clusters is not None and index.max() > 0 and 0 < p < 1:
        effect = max(1.0, _clustered_variance(array, index)[0] / (p * (1 - p) / (n - 1)))
    elif clusters is not None:
        effect = n / (int(index.max()) + 1)  # all alike, or one cluster: count clusters, the most cautious reading
    low, high = wilson(p * n / effect, n / effect)
    return Estimate(p, low, high, n, undefined)


def mean(values: Sequence[float] | Array, clusters: Clusters = None, undefined: int = 0) -> Estimate:
    """Mean with a t-interval; with clusters their standard error and C - 1 degrees of freedom."""
    array = _array(values)
    value = float(array.mean())
    index = _cluster_index(clusters, array.size)
    if index.max() == 0:
        return Estimate(value, -math.inf, math.inf, array.size, undefined)
    variance, count = _clustered_variance(array, index)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, array.size, undefined)


def ratio_of_sums(
    numerators: Sequence[float] | Array,
    denominators: Sequence[float] | Array,
    clusters: Clusters = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """sum(numerators) / sum(denominators), e.g. bits per byte; percentile bootstrap, both resampled jointly.

    Raises DataError if the denominators sum to zero.
    """
    tops, bottoms = _array(numerators, "numerators"), _array(denominators, "denominators")
    if tops.size != bottoms.size:
        raise DataError(f"statistics: {tops.size} numerators for {bottoms.size} denominators.")
    index = _cluster_index(clusters, tops.size)
    top, bottom = np.bincount(index, weights=tops), np.bincount(index, weights=bottoms)
    if bottom.sum() == 0:
        raise DataError("statistics: a ratio of sums needs denominators that do not sum to zero.")
    value = float(top.sum() / bottom.sum())
    if top.size < 2:
        return Estimate(value, -math.inf, math.inf, tops.size)
    picks = np.random.default_rng(seed).integers(top.size, size=(resamples, top.size))
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no denominator at all: infinite, or 0/0
        drawn = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    low, high = _percentiles(drawn[~np.isnan(drawn)])
    return Estimate(value, low, high, tops.size)


def bootstrap(
    statistic: Callable[..., float],
    *columns: Sequence[float] | Array,
    clusters: Clusters = None,
    strata: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Percentile interval of any statistic of per-document columns, which are resampled jointly.

    statistic  called with as many arrays as there are columns
    clusters   whole clusters are drawn with replacement
    strata     drawn within each stratum, so that their sizes (in clusters) stay as they are
    A proportion that is 0 or 1 has no spread to resample; use `proportion` there.
    """
    arrays = [_array(column, f"column {i}") for i, column in enumerate(columns)]
    n = arrays[0].size
    if any(array.size != n for array in arrays):
        raise DataError(f"statistics: columns of different lengths {[a.size for a in arrays]}.")
    index = _cluster_index(clusters, n)
    members = [np.flatnonzero(index == c) for c in range(int(index.max()) + 1)]
    stratum = _cluster_index(strata, n) if strata is not None else np.zeros(n, dtype=np.int64)
    groups: dict[int, list[int]] = {}
    for cluster, items in enumerate(members):
        if len(set(stratum[items].tolist())) > 1:
            raise DataError("statistics: a cluster lies in two strata; clusters must be nested in strata.")
        groups.setdefault(int(stratum[items[0]]), []).append(cluster)
    value = float(statistic(*arrays))
    if len(members) < 2:
        return Estimate(value, -math.inf, math.inf, n)
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for r in range(resamples):
        picks = [c for group in groups.values() for c in rng.choice(group, size=len(group))]
        rows = np.concatenate([members[c] for c in picks])
        drawn[r] = statistic(*(array[rows] for array in arrays))
    low, high = _percentiles(drawn)
    return Estimate(value, low, high, n)


def _percentiles(drawn: Array) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    finite = bool(np.isfinite(drawn).all())  # nothing lies between a number and infinity
    low, high = np.percentile(drawn, [tail, 100 - tail], method="linear" if finite else "inverted_cdf")
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that items flip either way alike: binomial(gained; gained + lost, 1/2)."""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def paired_t(differences: Sequence[float] | Array, clusters: Clusters = None) -> float:
    """Two-sided p-value that the mean difference is zero; 1 if all differences are zero, or nothing is known."""
    array = _array(differences, "differences")
    index = _cluster_index(clusters, array.size)
    if not array.any() or index.max() == 0:
        return 1.0
    variance, count = _clustered_variance(array, index)
    if variance == 0:
        return 0.0
    return float(2 * stats.t.sf(abs(array.mean()) / math.sqrt(variance), count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests, in the order given; rejecting those below a keeps the family at level a."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def minimum_detectable_effect(differences: Sequence[float] | Array, clusters: Clusters = None) -> float:
    """Smallest true mean difference that this many documents show (two-sided 5 %) four times in five."""
    array = _array(differences, "differences")
    index = _cluster_index(clusters, array.size)
    if index.max() == 0:
        return math.inf
    variance, count = _clustered_variance(array, index)
    needed = float(stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1))
    return needed * math.sqrt(variance)


def not_inferior(difference: Estimate, margin: float) -> bool:
    """Gate for compression: the lower bound of (compressed - reference) lies above -margin, declared beforehand."""
    if margin < 0:
        raise DataError(f"statistics: a non-inferiority margin is not negative, but is {margin}.")
    return difference.low > -margin
