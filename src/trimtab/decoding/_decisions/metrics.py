"""Each metric with its rule: what is decided of the outcomes of a pool of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.decoding._decisions import pools, rules
from trimtab.decoding._decisions.outcomes import Outcomes, Value

Metric = Literal[
    "exact_match",
    "squared_error",
    "absolute_error",
    "pinball",
    "squared_log_error",
    "mape",
    "pearson",
    "spearman",
    "auc",
    "ndcg",
    "f_beta",
    "kappa",
    "token_f1",
    "gain",
]
Gain = Callable[[Value, Value], float]
"""(answer, decision) -> how well it does; more is better."""

POOLED: frozenset[Metric] = frozenset({"spearman", "f_beta"})
"""Metrics whose rule looks at several prompts; with a threshold given, F does not."""
BINARY: frozenset[Metric] = frozenset({"auc", "f_beta"})
"""Metrics of one value against all others."""
WORDS: frozenset[Metric] = BINARY | {"exact_match", "token_f1", "gain"}
"""Metrics of answers that need not be numbers."""
SEARCHED: frozenset[Metric] = frozenset({"token_f1", "gain"})
"""Metrics without a closed form: the best of the answers themselves."""


@dataclass(frozen=True)
class Rule:
    """A metric with what it needs to know.

    positive    the value that counts as 1
    level       of the pinball loss
    beta        of F
    threshold   of F, if it is known beforehand
    gain        of the metric `gain`
    """

    metric: Metric
    positive: Value = 1.0
    level: float = 0.5
    beta: float = 1.0
    threshold: float | None = None
    gain: Gain | None = None

    def decide(self, pool: Sequence[Outcomes]) -> tuple[list[Value], float | None]:
        """A decision for each of the pool, and the threshold if there is one."""
        if self.metric == "f_beta":
            probabilities = np.array([own.probability(self.positive) for own in pool])
            found = pools.f_beta_threshold(probabilities, self.beta) if self.threshold is None else self.threshold
            return [float(p > found) for p in probabilities], found
        if self.metric == "spearman":
            return list(pools.mid_ranks([(own.numbers("spearman"), own.weights) for own in pool]).tolist()), None
        return [self._act(own) for own in pool], None

    def _act(self, own: Outcomes) -> Value:
        if self.metric in WORDS:
            return self._of_words(own)
        values, weights = own.numbers(self.metric), own.weights
        if self.metric == "pinball":
            return rules.quantile(values, weights, self.level)
        if self.metric == "kappa":
            return rules.nearest_to_mean(values, weights, values.tolist())
        return _CLOSED_FORMS[self.metric](values, weights)

    def _of_words(self, own: Outcomes) -> Value:
        if self.metric == "exact_match":
            return rules.mode(own.values, own.weights)
        if self.metric == "auc":
            return own.probability(self.positive)
        gain = rules.token_f1 if self.gain is None else self.gain
        return rules.minimum_bayes_risk(own.values, own.weights, own.values, gain)


_CLOSED_FORMS: dict[Metric, Callable[[rules.Array, rules.Array], float]] = {
    "squared_error": rules.mean,
    "absolute_error": rules.median,
    "squared_log_error": rules.log_mean,
    "mape": rules.relative_median,
    "pearson": rules.mean,
    "ndcg": rules.gain,
}
