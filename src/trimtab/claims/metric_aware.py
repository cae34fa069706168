"""Claims of metric-aware inference: each metric has its own best answer, a few draws do, labels cost one tree."""

from __future__ import annotations

import functools
import statistics as medians
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from transformers import PreTrainedModel

from trimtab.claims._ratings import STARS, rating_model, reviews
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding._decisions.metrics import Metric, Rule
from trimtab.decoding._decisions.outcomes import Outcomes
from trimtab.decoding._decoder import Decoder
from trimtab.decoding._sampling import Sampling
from trimtab.decoding._tree import ROOT
from trimtab.decoding.metric_aware import Decisions, MetricAware
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate
from trimtab.models import load, tokenizer_of
from trimtab.world import examples

__all__ = ["CLAIMS"]

Array = NDArray[np.float64]
REVIEWS, SUMS = 2400, 1024
BEST = float(STARS[-1])
LEVEL = 0.9
DRAWS, DRAWN_REVIEWS = 16, 300
RESAMPLES = 1000
NUMBERS = tuple(map(str, range(199)))
TRIE_PROMPTS, TURNS = 4, 5
CLOSE = 1e-5


def rmse(y: Array, v: Array) -> float:
    return float(np.sqrt(np.mean((y - v) ** 2)))


def mae(y: Array, v: Array) -> float:
    return float(np.mean(np.abs(y - v)))


def pinball(y: Array, v: Array) -> float:
    return float(np.mean(np.maximum(LEVEL * (y - v), (LEVEL - 1) * (y - v))))


def rmsle(y: Array, v: Array) -> float:
    return rmse(np.log1p(y), np.log1p(v))


def mape(y: Array, v: Array) -> float:
    return float(np.mean(np.abs(y - v) / y))


def pearson(y: Array, v: Array) -> float:
    return float(np.corrcoef(y, v)[0, 1]) if v.std() > 0 else 0.0


def spearman(y: Array, v: Array) -> float:
    return pearson(rankdata(y), rankdata(v))


def auc(y: Array, v: Array) -> float:
    """Of five stars against fewer; ties count half."""
    best = y == BEST
    ranks = rankdata(v)[best]
    return float((ranks.mean() - (best.sum() + 1) / 2) / (~best).sum())


def ndcg(y: Array, v: Array) -> float:
    """Of all reviews as one list; equal scores share the discounts of their places."""
    discounts = 1 / np.log2(2 + np.arange(y.size))
    _, group = np.unique(-v, return_inverse=True)
    group = group.reshape(-1)
    shared = np.bincount(np.sort(group), weights=discounts) / np.bincount(group)
    gains = 2**y - 1
    return float(gains @ shared[group] / (np.sort(gains)[::-1] @ discounts))


def f1(y: Array, v: Array) -> float:
    """Of finding five stars; v is 1 where they are predicted."""
    right = float(((y == BEST) & (v == 1)).sum())
    return 2 * right / float((y == BEST).sum() + (v == 1).sum()) if right else 0.0


def kappa(y: Array, v: Array) -> float:
    """Quadratic weights: 1 - squared error / squared error of the same decisions dealt out at random."""
    return float(1 - np.mean((y - v) ** 2) / (y.var() + v.var() + (y.mean() - v.mean()) ** 2))


MEASURES: dict[Metric, tuple[Callable[[Array, Array], float], bool]] = {
    "squared_error": (rmse, False),
    "absolute_error": (mae, False),
    "pinball": (pinball, False),
    "squared_log_error": (rmsle, False),
    "mape": (mape, False),
    "pearson": (pearson, True),
    "spearman": (spearman, True),
    "auc": (auc, True),
    "ndcg": (ndcg, True),
    "f_beta": (f1, True),
    "kappa": (kappa, True),
}
"""Metric -> how it is measured, and whether more is better."""


@functools.cache
def rated() -> tuple[Array, Decisions]:
    """Stars of held-out reviews, and what the model that learned to rate believes of them; decided: the likeliest."""
    rows = reviews("eval", REVIEWS)
    found = MetricAware(metric="exact_match", labels=STARS).decide(rating_model(), [row.prompt for row in rows])
    return np.array([row.stars for row in rows], dtype=np.float64), found


def numbers(values: Sequence[float | str]) -> Array:
    return np.array(values, dtype=np.float64)


def gain_over(metric: Metric, y: Array, decided: Array, likeliest: Array) -> Estimate:
    """By how much the decisions do better than the likeliest answers on their metric; reviews resampled."""
    measure, more = MEASURES[metric]

    def difference(truth: Array, own: Array, other: Array) -> float:
        return (measure(truth, own) - measure(truth, other)) * (1 if more else -1)

    return statistics.bootstrap(difference, y, decided, likeliest, resamples=RESAMPLES)


def compared(metrics: Sequence[Metric], y: Array, pool: Sequence[Outcomes], likeliest: Array) -> Outcome:
    """Each metric's own rule against the likeliest answers; holds if all gains are above zero with 95 % confidence."""
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    lows = []
    for metric in metrics:
        measure, _ = MEASURES[metric]
        decided = numbers(Rule(metric, positive=BEST, level=LEVEL).decide(pool)[0])
        other = (likeliest == BEST).astype(np.float64) if metric == "f_beta" else likeliest
        gain = gain_over(metric, y, decided, other)
        measured |= {measure.__name__: measure(y, decided), f"{measure.__name__}_gain_low": gain.low}
        baseline[f"{measure.__name__}_likeliest"] = measure(y, other)
        lows.append(gain.low)
    return Outcome(measured, baseline, min(lows) > 0)


def mean_and_median_of_ratings() -> Outcome:
    y, found = rated()
    return compared(("squared_error", "absolute_error"), y, found.outcomes, numbers(found.values))


def every_metric_of_ratings() -> Outcome:
    y, found = rated()
    others = [metric for metric in MEASURES if metric not in ("squared_error", "absolute_error")]
    return compared(others, y, found.outcomes, numbers(found.values))


@functools.cache
def sums(name: str) -> tuple[Array, Decisions]:
    """Results of held-out sums and differences, and what a shipped model believes of them."""
    rows = examples("arithmetic", "eval", SUMS, 0)
    model = load(name, dtype=torch.float32)
    found = MetricAware(metric="exact_match", labels=NUMBERS, lead="").decide(model, [row.prompt for row in rows])
    return np.array([float(row.answer) for row in rows]), found


def mean_and_median_of_sums() -> Outcome:
    y, found = sums("ref-mini")
    outcome = compared(("squared_error", "absolute_error"), y, found.outcomes, numbers(found.values))
    right = float(np.mean(numbers(found.values) == y))
    return Outcome(outcome.measured, {**outcome.baseline, "share_right_likeliest": right}, outcome.holds)


def a_few_draws() -> Outcome:
    rows = reviews("eval", DRAWN_REVIEWS)
    y = np.array([row.stars for row in rows], dtype=np.float64)
    prompts = [row.prompt for row in rows]
    drawn = MetricAware(metric="squared_error", samples=DRAWS).decide(
        rating_model(), prompts, sampling=Sampling(max_new_tokens=4)
    )
    scored = rated()[1]
    likeliest = numbers(scored.values)[:DRAWN_REVIEWS]
    gain = gain_over("squared_error", y, numbers(drawn.values), likeliest)
    limit = numbers(Rule("squared_error").decide(scored.outcomes[:DRAWN_REVIEWS])[0])
    return Outcome(
        measured={
            "rmse": rmse(y, numbers(drawn.values)),
            "rmse_gain_low": gain.low,
            "calls_per_decision": drawn.calls_per_decision,
            "tokens_per_decision": drawn.tokens_per_decision,
            "share_of_draws_that_are_numbers": float(np.mean([own.mass for own in drawn.outcomes])),
        },
        baseline={
            "rmse_likeliest": rmse(y, likeliest),
            "rmse_scored": rmse(y, limit),
            "calls_per_decision_scored": scored.calls_per_decision,
            "tokens_per_decision_scored": scored.tokens_per_decision,
        },
        holds=gain.low > 0,
    )


def one_by_one(model: PreTrainedModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Array:
    """log p of each answer, a row of a batch for each; the prompt is read once for all of them."""
    reader = Decoder(model).reader(len(answers))
    reader.prefill([prompt[:-1]] * len(answers))
    rows = reader.read(
        [[prompt[-1], *answer[:-1]] for answer in answers], [list(range(ROOT, len(answer) - 1)) for answer in answers]
    )
    return np.array([totalled(own.logits, answer) for own, answer in zip(rows, answers, strict=True)])


def whole_texts(model: PreTrainedModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Array:
    """log p of each answer, prompt and answer read as one text, a row of a batch for each."""
    width = len(prompt) + max(map(len, answers)) - 1
    ids = torch.zeros((len(answers), width), dtype=torch.long)
    for row, answer in enumerate(answers):
        text = [*prompt, *answer[:-1]]
        ids[row, : len(text)] = torch.tensor(text)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, len(prompt) - 1 :]
    return np.array([totalled(own, answer) for own, answer in zip(logits, answers, strict=True)])


def totalled(logits: torch.Tensor, answer: Sequence[int]) -> float:
    log_probs = torch.log_softmax(logits[: len(answer)].float(), dim=-1)
    return float(log_probs[range(len(answer)), list(answer)].double().sum())


def one_tree_for_all_labels() -> Outcome:
    model = load("ref", dtype=torch.float32)
    tokenizer = tokenizer_of(model)
    method = MetricAware(metric="squared_error", labels=NUMBERS, lead="")
    prompts = [list(tokenizer(row.prompt)["input_ids"]) for row in examples("arithmetic", "eval", TRIE_PROMPTS, 0)]
    answers = [list(tokenizer(f"{n}\n", add_special_tokens=False)["input_ids"]) for n in NUMBERS]
    ways: dict[str, Callable[[Sequence[int]], Array]] = {
        "trie": lambda prompt: _scores(method.decide(model, [prompt])),
        "one_by_one": lambda prompt: one_by_one(model, prompt, answers),
        "whole_texts": lambda prompt: whole_texts(model, prompt, answers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    largest = 0.0
    for turn in range(TURNS + 1):
        found = {}
        for name, score in ways.items():
            start = time.perf_counter()
            found[name] = [score(prompt) for prompt in prompts]
            if turn:  # the first is to warm up
                seconds[name].append((time.perf_counter() - start) / len(prompts))
        for one, other in zip(found["trie"], found["one_by_one"], strict=True):
            largest = max(largest, float(np.max(np.abs(one - other) / np.maximum(1, np.abs(other)))))
    taken = {name: medians.median(own) for name, own in seconds.items()}
    cost = method.decide(model, prompts)
    prompt_tokens = float(np.mean([len(prompt) for prompt in prompts]))
    return Outcome(
        measured={
            "largest_relative_difference_of_log_probs": largest,
            "milliseconds_per_prompt": taken["trie"] * 1e3,
            "tokens_per_decision": cost.tokens_per_decision,
        },
        baseline={
            "milliseconds_per_prompt_one_by_one": taken["one_by_one"] * 1e3,
            "milliseconds_per_prompt_whole_texts": taken["whole_texts"] * 1e3,
            "tokens_per_decision_one_by_one": prompt_tokens - 1 + sum(map(len, answers)),
            "tokens_per_decision_whole_texts": sum(prompt_tokens + len(answer) - 1 for answer in answers),
        },
        holds=largest < CLOSE and taken["trie"] < min(taken["one_by_one"], taken["whole_texts"]),
    )


def _scores(found: Decisions) -> Array:
    """log p of each label of the only prompt, in the order of the labels."""
    (own,) = found.outcomes
    return np.asarray(np.log(own.weights) + np.log(own.mass), dtype=np.float64)


_PAPER = method_info("metric_aware").paper
_RATED = (
    f"ref-mini trained on rated reviews of the training split, whose raters disagree; {REVIEWS} held-out reviews with "
    "the stars of one rater each, all five labels scored"
)
_RULE = "Holds if the 95 % interval of the gain over the likeliest label, the baseline, is above zero"

CLAIMS = (
    Claim(
        "metric_aware",
        _PAPER,
        "Answering with the mean of what the model believes lowers the squared error of ratings, and with the median "
        "the absolute error.",
        f"{_RATED}. {_RULE} for both (reviews resampled).",
        mean_and_median_of_ratings,
    ),
    Claim(
        "metric_aware",
        _PAPER,
        "Every metric has a best answer of its own: its closed form beats the likeliest answer on it.",
        f"{_RATED}: pinball loss at {LEVEL}, RMSLE, MAPE, Pearson, Spearman, AUC and F1 of five stars, NDCG, quadratic "
        f"kappa. {_RULE} for each of them. (For exact match the likeliest label is the best answer.)",
        every_metric_of_ratings,
    ),
    Claim(
        "metric_aware",
        _PAPER,
        "It needs no training: a model that was never meant to be asked so does better by it on numbers, too.",
        f"ref-mini as shipped, {SUMS} held-out sums and differences, all numbers up to {NUMBERS[-1]} scored. {_RULE}, "
        "for RMSE with the mean and MAE with the median. (ref is right and certain in all of them.)",
        mean_and_median_of_sums,
    ),
    Claim(
        "metric_aware",
        _PAPER,
        f"A few draws are enough: the mean of {DRAWS} beats the likeliest answer.",
        f"{DRAWN_REVIEWS} of the same reviews, {DRAWS} draws each at temperature 1 that share the reading of their "
        f"prompt. {_RULE}, in RMSE. Beside it: all labels scored, which the draws tend to.",
        a_few_draws,
    ),
    Claim(
        "metric_aware",
        _PAPER,
        "All answers of a finite set can be scored; as one draft tree they cost one forward pass and no accuracy.",
        f"ref, {TRIE_PROMPTS} sums, {len(NUMBERS)} numbers, float32, one process, median of {TURNS} turns. Baselines: "
        f"a row for each label after a prompt read once, and prompt and label as a text for each. Holds if no "
        f"log-probability differs by {CLOSE:g} of itself (of 1 below 1) and the tree is faster than both.",
        one_tree_for_all_labels,
    ),
)
