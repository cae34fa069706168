"""Decisions for several prompts at once, where the metric is of the whole set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.core.errors import DataError
from trimtab.decoding._decisions.rules import Array, normalised


def expected_f_beta(probabilities: Array, decisions: Array, beta: float = 1.0) -> float:
    """F of these decisions [n] (0 or 1) with each count replaced by its expectation; 0 where none is positive.

    F = (1 + beta^2) tp / (beta^2 positives + decided). `probabilities` [n] are those of the positive answer.
    """
    below = beta**2 * probabilities.sum() + decisions.sum()
    return float((1 + beta**2) * (probabilities @ decisions) / below) if below > 0 else 0.0


def f_beta_threshold(probabilities: Sequence[float] | Array, beta: float = 1.0) -> float:
    """The probability above which to decide 1, so that the expected F of the pool is the greatest, F*.

    It is F* / (1 + beta^2). Starting from 0, the F of the decisions at the last threshold gives the next one, which is
    never lower and comes to rest in a few steps (Dinkelbach's method). Raises DataError for what is no probability.
    """
    array = np.asarray(probabilities, dtype=np.float64)
    if array.size == 0 or not ((array >= 0) & (array <= 1 + 1e-9)).all():
        raise DataError(f"F needs a pool of probabilities in [0, 1], but has {array.tolist()[:8]}.")
    threshold = 0.0
    while True:
        reached = expected_f_beta(array, (array > threshold).astype(np.float64), beta) / (1 + beta**2)
        if reached <= threshold:
            return threshold
        threshold = reached


def mid_ranks(pool: Sequence[tuple[Sequence[float] | Array, Sequence[float] | Array]]) -> Array:
    """Spearman's correlation: for each (values, weights) of the pool the expected rank among all of it, in (0, 1).

    sum_i w_i F(y_i) with F(y) = P(Y < y) + P(Y = y) / 2 of an answer Y to any prompt of the pool. A heuristic in so far
    as the ranks of a small pool depend on which answers come together.
    """
    columns = [np.asarray(values, dtype=np.float64) for values, _ in pool]
    shares = [normalised(weights, len(values)) for values, weights in pool]
    levels, index = np.unique(np.concatenate(columns), return_inverse=True)
    marginal = np.bincount(index.reshape(-1), weights=np.concatenate(shares), minlength=levels.size) / len(pool)
    ranks = np.cumsum(marginal) - marginal / 2
    return np.array([w @ ranks[np.searchsorted(levels, y)] for y, w in zip(columns, shares, strict=True)])
