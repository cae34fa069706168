"""Bayes acts: which answer is expected to do best by a metric, when answer y_i has weight w_i.

Each rule is the closed form of `argmax_v sum_i w_i m(y_i, v)` for one metric m, of one prompt by itself; `pools` has
those that look at several prompts. Values are float64 [n], finite; weights float64 [n], not negative, of any sum.
All raise DataError for values and weights that are none.

Source: Lukasik et al., arXiv:2403.04182, and textbook decision theory for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import DataError

Array = NDArray[np.float64]
V = TypeVar("V", bound=Hashable)
_ROUNDING = 1e-12
"""By how much a sum of weights may miss a level that it reaches in exact arithmetic."""


def normalised(weights: Sequence[float] | Array, count: int) -> Array:
    """The weights as shares of their sum."""
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (count,) or count == 0:
        raise DataError(f"a decision needs a weight for each value; there are {count} values, weights {array.shape}.")
    if not (np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0):
        raise DataError(f"weights must be finite, not negative and not all zero, but are {array.tolist()[:8]}.")
    shares: Array = array / array.sum()
    return shares


def _numbers(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> tuple[Array, Array]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise DataError(f"values must be finite numbers, but are {array.tolist()[:8]}.")
    return array, normalised(weights, array.size)


def mode(values: Sequence[V], weights: Sequence[float] | Array) -> V:
    """Exact match: the value of most weight, equal values counting together; of equals the first."""
    shares = normalised(weights, len(values))
    total: dict[V, float] = {}
    for value, share in zip(values, shares, strict=True):
        total[value] = total.get(value, 0.0) + float(share)
    return max(total, key=total.__getitem__)


def mean(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """Squared error, RMSE, R^2; also Pearson's correlation and pairs ranked at the cost of their difference."""
    array, shares = _numbers(values, weights)
    return float(shares @ array)


def quantile(values: Sequence[float] | Array, weights: Sequence[float] | Array, level: float) -> float:
    """Pinball loss at this level in (0, 1): the smallest value whose cumulative weight reaches it."""
    array, shares = _numbers(values, weights)
    order = np.argsort(array, kind="stable")
    reached = np.cumsum(shares[order]) >= level - _ROUNDING
    return float(array[order[int(np.argmax(reached))]]) if reached.any() else float(array.max())


def median(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """Absolute error; of a whole interval of medians the lowest."""
    return quantile(values, weights, 0.5)


def log_mean(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """Squared error of log(1 + y). Raises DataError for a value of -1 or less."""
    array, shares = _numbers(values, weights)
    if (array <= -1).any():
        raise DataError(f"log(1 + y) is not defined for {array.min():g}; squared_log_error is for values above -1.")
    return float(np.expm1(shares @ np.log1p(array)))


def relative_median(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """Absolute percentage error |y - v| / |y|: the median under weights w / |y|. Raises DataError for a value of 0."""
    array, shares = _numbers(values, weights)
    if (array[shares > 0] == 0).any():
        raise DataError("a percentage of 0 is not defined; mape is for values other than 0.")
    kept = shares > 0
    return median(array[kept], shares[kept] / np.abs(array[kept]))


def gain(values: Sequence[float] | Array, weights: Sequence[float] | Array) -> float:
    """NDCG: the expected gain 2^y - 1, by which to rank."""
    array, shares = _numbers(values, weights)
    return float(shares @ (np.exp2(array) - 1))


def nearest_to_mean(values: Sequence[float] | Array, weights: Sequence[float] | Array, grid: Sequence[float]) -> float:
    """Squared error among the values of a grid, as quadratic weighted kappa has it; of two equally near the lower.

    Kappa also rewards a spread of decisions as wide as that of the answers, which no prompt by itself can see to.
    """
    centre = mean(values, weights)
    return min(sorted(grid), key=lambda v: abs(v - centre))


def minimum_bayes_risk(
    values: Sequence[V], weights: Sequence[float] | Array, candidates: Sequence[V], metric: Callable[[V, V], float]
) -> V:
    """Any metric(y, v) of an answer y and a decision v, more being better: the best candidate, of equals the first."""
    shares = normalised(weights, len(values))
    if not candidates:
        raise DataError("there is no candidate to decide for.")
    likely = [(y, float(w)) for y, w in zip(values, shares, strict=True) if w > 0]
    return max(candidates, key=lambda v: sum(w * metric(y, v) for y, w in likely))


def token_f1(answer: Hashable, decision: Hashable) -> float:
    """Harmonic mean of precision and recall of the words, upper and lower case alike, as answers to questions are
    scored; 1 for two empty texts."""
    own, other = (str(text).lower().split() for text in (answer, decision))
    if not own or not other:
        return float(own == other)
    common = sum(min(own.count(word), other.count(word)) for word in set(own))
    return 2 * common / (len(own) + len(other))
