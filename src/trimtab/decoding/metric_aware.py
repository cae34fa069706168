"""Answer with what is expected to score best by the metric, not with the likeliest answer.

Paper: Michal Lukasik, Harikrishna Narasimhan, Aditya Krishna Menon, Felix Yu, Sanjiv Kumar, "Regression-aware Inference
with LLMs", Findings of EMNLP 2024, arXiv:2403.04182.

A model gives answers y_i with probabilities w_i. For a metric m the best decision is `argmax_v sum_i w_i m(y_i, v)`:

    exact_match                              the value of most weight, texts of equal value together
    squared_error, pearson                   the mean; also for RMSE, R^2, pairs ranked at the cost of their difference
    absolute_error, pinball                  the median, the quantile at `level`
    squared_log_error                        exp(sum w log(1 + y)) - 1
    mape                                     the median under weights w / |y|
    auc                                      P(y = positive), by which to rank
    ndcg                                     sum w (2^y - 1), by which to rank
    spearman                                 expected mid-rank among the answers of all prompts
    f_beta                                   1 above F* / (1 + beta^2), F* the greatest expected F of all prompts
    kappa (quadratic weights)                the label nearest to the mean
    token_f1, gain (any function of two)     the best of the answers by expectation

The weights come from `labels`, if there are, all scored as a trie in one forward pass; otherwise from `samples` draws.
Departures: none of the method; quantile, logarithm, percentages, ranks, F and kappa follow from the same principle.
Cost: with labels the prompt and the trie's inner nodes; with samples as many texts, the prompt read once.
Fails where the model's probabilities are wrong: a decision is as good as the belief it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trimtab.core.errors import ConfigError, DataError
from trimtab.decoding._decisions.estimates import Weighting, sampled, scored
from trimtab.decoding._decisions.labels import Continuations
from trimtab.decoding._decisions.metrics import BINARY, POOLED, SEARCHED, WORDS, Gain, Metric, Rule
from trimtab.decoding._decisions.outcomes import Outcomes, Parse, Value, number_in, value_in
from trimtab.decoding._ledger import DecodingLedger
from trimtab.decoding._loop import Generation
from trimtab.decoding._sampling import Sampling
from trimtab.decoding.base import DecodingMethod
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.decoding._decoder import Decoder

__all__ = ["MetricAware"]


@dataclass(frozen=True)
class Decisions:
    """What was decided for each prompt, and what it cost.

    values      numbers, or words; for metrics by which to rank the scores to rank by
    texts       how they are written
    outcomes    what the model believed
    threshold   of F: 1 was decided above this probability; None for other metrics
    ledger      `prompts` and `rounds` count the model calls that each text took part in
    """

    values: list[Value]
    texts: list[str]
    outcomes: list[Outcomes]
    threshold: float | None
    ledger: DecodingLedger = field(default_factory=DecodingLedger)

    @property
    def calls_per_decision(self) -> float:
        """Forward passes that a prompt or one of its texts took part in, whatever the batch."""
        return (self.ledger.prompts + self.ledger.rounds) / len(self.values)

    @property
    def tokens_per_decision(self) -> float:
        """Tokens that the model read, those of the prompt included."""
        return (self.ledger.prompt_tokens + self.ledger.nodes_scored) / len(self.values)


@dataclass(frozen=True, kw_only=True)
class MetricAware(DecodingMethod):
    """Decide with the metric.

    metric       exact_match, squared_error, absolute_error, pinball, squared_log_error, mape, pearson, spearman, auc,
                 ndcg, f_beta, kappa, token_f1 or gain
    labels       all answers there are, which are scored; none: draw answers instead
    lead         stands between the prompt and an answer
    end          ends an answer and is part of its probability; empty: nothing does
    positive     the answer that counts as 1 for auc and f_beta; empty: the number 1
    level        of the quantile that pinball asks for
    beta         how much more recall weighs than precision in f_beta
    threshold    of f_beta, from a validation pool; None: found on the prompts themselves, without their answers
    renormalise  divide by the probability of all labels; False, for squared_error: the plain sum of p(y) y
    samples      draws for each prompt if there are no labels
    weights      of draws: counts (each alike), importance (p / r, for warped draws), probability (each text once, by
                 its probability)
    temperature  of the draws
    top_p        of the draws
    """

    lossless: ClassVar[bool] = False

    metric: Metric = "exact_match"
    labels: tuple[str, ...] = ()
    lead: str = " "
    end: str = "\n"
    positive: str = ""
    level: float = 0.5
    beta: float = 1.0
    threshold: float | None = None
    renormalise: bool = True
    samples: int = 16
    weights: Weighting = "counts"
    temperature: float = 1.0
    top_p: float = 1.0

    def check(self) -> None:
        for name, fits, wanted in (
            ("level", 0 < self.level < 1, "above 0 and below 1"),
            ("beta", self.beta > 0, "above 0"),
            ("threshold", self.threshold is None or 0 <= self.threshold <= 1, "in [0, 1]"),
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0: one likeliest answer tells nothing of the others"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise ConfigError(f"MetricAware: {name} is {getattr(self, name)}; it must be {wanted}.")
        if self.labels:
            self._check_labels()
        elif self.metric == "kappa":
            raise ConfigError("MetricAware: kappa decides among labels; name all of them as `labels`.")
        elif self.weights == "counts" and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ConfigError(
                f"MetricAware: draws at temperature {self.temperature:g} and top_p {self.top_p:g} do not come as often "
                "as the model believes in them; set weights=importance, or leave both at 1."
            )
        if not self.renormalise and (self.metric != "squared_error" or not self.labels):
            raise ConfigError("MetricAware: renormalise=False is for squared_error with labels.")

    def _check_labels(self) -> None:
        for label in self.labels:
            if label != label.strip() or not label:
                raise ConfigError(
                    f"MetricAware: the label {label!r} is empty or has white space around it; what stands before a "
                    "label is `lead`, what ends it is `end`."
                )
            if self.metric not in WORDS and number_in(label) is None:
                raise ConfigError(f"MetricAware: {self.metric} is for numbers, but '{label}' is a label.")
        ended = [label + self.end for label in self.labels]
        for one, text in zip(self.labels, ended, strict=True):
            if ended.count(text) > 1:
                raise ConfigError(f"MetricAware: the label '{one}' is named more than once.")
            if longer := next((other for other in ended if other != text and other.startswith(text)), None):
                raise ConfigError(
                    f"MetricAware: the label '{one}' is the beginning of '{longer}', so the probability of the one "
                    "holds that of the other; give an `end` that tells them apart."
                )
        if self.metric in BINARY and self._positive not in map(value_in, self.labels):
            raise ConfigError(
                f"MetricAware: {self.metric} asks how likely '{self._positive}' is, which is no label; name one of "
                f"them as `positive`: {', '.join(self.labels[:8])}."
            )

    @property
    def _positive(self) -> Value:
        value = value_in(self.positive) if self.positive else 1.0
        return self.positive if value is None else value

    def decide(
        self,
        model: PreTrainedModel | Decoder,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        sampling: Sampling | None = None,
        gain: Gain | None = None,
        parse: Parse | None = None,
    ) -> Decisions:
        """Decide for a pool of prompts, texts or token ids.

        model      or a Decoder of it, whose transforms, cache and drafts are then in use
        sampling   how long draws may be, what else stops them and their seed; its temperature and the like do not count
        gain       (answer, decision) -> how well it does, for the metric `gain`
        parse      text of an answer -> its value, None for what is none, which is dropped and counted; default: the
                   number that it spells, and for metrics that allow words otherwise the words

        Raises DataError for an empty pool, for prompts without an answer that can be used, and for answers that the
        metric is not for; ConfigError for a metric that lacks its `gain`.
        """
        from trimtab.decoding._decoder import Decoder

        if (gain is None) == (self.metric == "gain"):
            raise ConfigError("MetricAware: the metric `gain`, and no other, needs the function `gain` in Python.")
        if not prompts:
            raise DataError("there is no prompt to decide for.")
        decoder = model if isinstance(model, Decoder) else Decoder(model, [self])
        encoded = [_tokens(decoder, prompt) for prompt in prompts]
        decoder.check_length(encoded, Sampling(max_new_tokens=1))
        spent: list[DecodingLedger] = []
        outcomes = self._outcomes(decoder, encoded, sampling or Sampling(), parse, spent)
        rule = Rule(self.metric, self._positive, self.level, self.beta, self.threshold, gain)
        values, threshold = rule.decide(outcomes)
        if not self.renormalise:
            values = [float(value) * own.mass for value, own in zip(values, outcomes, strict=True)]
        texts = [self._written(value, own) for value, own in zip(values, outcomes, strict=True)]
        return Decisions(values, texts, outcomes, threshold, DecodingLedger.sum(spent))

    def _outcomes(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        parse: Parse | None,
        spent: list[DecodingLedger],
    ) -> list[Outcomes]:
        reading: dict[str, Any] = {
            "end": self.end,
            "parse": parse or (value_in if self.metric in WORDS else number_in),
            "spent": spent,
        }
        if self.labels:
            return scored(decoder, prompts, self.labels, lead=self.lead, **reading)
        own = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=sampling.max_new_tokens,
            stop_tokens=sampling.stop_tokens,
            stop_strings=sampling.stop_strings,
            seed=sampling.seed,
        )
        decoder.check_length(prompts, own)
        greedy = self.metric in SEARCHED
        return sampled(decoder, prompts, own, self.samples, weighting=self.weights, with_greedy=greedy, **reading)

    def _written(self, value: Value, own: Outcomes) -> str:
        if self.metric == "f_beta":
            by_weight = [own.values[i] for i in np.argsort(own.weights)]
            likeliest = {v == self._positive: own.texts[own.values.index(v)] for v in by_weight}
            return likeliest.get(value == 1, f"{value:g}")
        if value in own.values:
            return own.texts[own.values.index(value)]
        return value if isinstance(value, str) else f"{value:.6g}"

    def search(self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Generation:
        """Write the decision after each prompt; those of a metric of the whole set are decided over the batch.

        Raises ConfigError for a single prompt and a metric that is of a set.
        """
        if len(prompts) == 1 and self.metric in POOLED and self.threshold is None:
            raise ConfigError(
                f"{self.metric} is a metric of a set: decide for all prompts at once with "
                "MetricAware.decide(model, prompts)."
            )
        found = self.decide(decoder, prompts, sampling=sampling)
        tokens = [
            Continuations(tokenizer_of(decoder.model), [f"{self.lead}{text}"]).after(prompt)[0]
            for prompt, text in zip(prompts, found.texts, strict=True)
        ]
        limit = sampling.max_new_tokens
        found.ledger.committed += sum(min(len(own), limit) for own in tokens)
        return Generation(
            [own[:limit] for own in tokens],
            ["decision" if len(own) <= limit else "length" for own in tokens],
            found.ledger,
        )


def _tokens(decoder: Decoder, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer_of(decoder.model)(prompt, verbose=False)["input_ids"])
    return list(prompt)
