"""Claims of DoLa: facts, the choice of the layer, cost, and drafts.

What is asked are the closed-book facts of the small world, which `ref` has learnt, and questions whose context
contradicts such a fact. `ref` knows all facts, so there is nothing to gain; rounded to few bits it has forgotten some.
"""

from __future__ import annotations

import functools
import statistics as plain_statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from trimtab import world
from trimtab.claims._reference import reference
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._reader import ModelReader
from trimtab.decoding.dola import Dola
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate
from trimtab.models import load, tokenizer_of
from trimtab.models.compression import compress
from trimtab.weights import Rtn
from trimtab.world.types import Example

__all__ = ["CLAIMS"]

QUESTIONS = 192
BITS: Literal[2, 3] = 2
ANSWER_TOKENS = 8
TEXTS, NEW_TOKENS, DEPTH = 8, 24, 4
STEPS, CONTEXT = 100, 64
ALLOWED_COST = 1.10


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """ref, or ref rounded."""
    model = reference()
    if name == "rounded":
        compress(model, Rtn(bits=BITS))
    return model


@functools.cache
def questions(task: str) -> tuple[Example, ...]:
    if task == "facts":
        return tuple(world.examples("facts", "eval", QUESTIONS, 0))
    return tuple(world.examples("openbook", "eval", QUESTIONS, 0, agrees=False))


@dataclass(frozen=True, slots=True)
class Answers:
    """1 for each question whose answer is written as it should be, to the end of the line."""

    right: tuple[float, ...]
    clusters: tuple[str | None, ...]

    @property
    def estimate(self) -> Estimate:
        return statistics.proportion(self.right, self.clusters)

    def over(self, other: Answers) -> Estimate:
        """The difference, question by question."""
        return statistics.mean([a - b for a, b in zip(self.right, other.right, strict=True)], self.clusters)


@functools.cache
def answers(name: str, task: str, method: Dola | None) -> Answers:
    """Greedy answers of a model, with DoLa or without."""
    model = model_of(name)
    tokenizer = tokenizer_of(model)
    asked = questions(task)
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, stop_strings=("\n",), stop_tokens=(tokenizer.eos_token_id,))
    prompts = [tokenizer(example.prompt)["input_ids"] for example in asked]
    written = Decoder(model, [] if method is None else [method]).generate(prompts, sampling).tokens
    lines = [str(tokenizer.decode(tokens, skip_special_tokens=True)).split("\n")[0] for tokens in written]
    right = [float(line.strip() == example.answer.strip()) for line, example in zip(lines, asked, strict=True)]
    return Answers(tuple(right), tuple(example.cluster for example in asked))


def _figures(name: str, found: Answers) -> dict[str, float]:
    estimate = found.estimate
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def more_facts() -> Outcome:
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for name in ("ref", "rounded"):
        for task in ("facts", "conflict"):
            measured |= _figures(f"{task}_{name}_dola", answers(name, task, Dola()))
            baseline |= _figures(f"{task}_{name}_greedy", answers(name, task, None))
    gain = answers("rounded", "facts", Dola()).over(answers("rounded", "facts", None))
    measured |= {"gain_rounded": gain.value, "gain_rounded_low": gain.low, "gain_rounded_high": gain.high}
    return Outcome(measured=measured, baseline=baseline, holds=gain.low > 0)


def _all_layers() -> tuple[int, ...]:
    return tuple(range(1, model_of("ref").config.num_hidden_layers))


def chosen_beats_fixed() -> Outcome:
    """The same candidates for both, so that only the choice differs."""
    layers = _all_layers()
    dynamic = answers("rounded", "facts", Dola(layers=layers))
    fixed = {layer: answers("rounded", "facts", Dola(layers=(layer,))) for layer in layers}
    best = max(fixed.values(), key=lambda found: found.estimate.value)
    gain = dynamic.over(best)
    return Outcome(
        measured=_figures("facts_rounded_chosen", dynamic) | {"gain_low": gain.low, "gain_high": gain.high},
        baseline={f"facts_rounded_layer_{layer}": found.estimate.value for layer, found in fixed.items()},
        holds=gain.low > 0,
    )


def small_cost() -> Outcome:
    plain, dola = _step_times([None, Dola()])
    ratio = plain_statistics.median(b / a for a, b in zip(plain, dola, strict=True))
    return Outcome(
        measured={"step_ms_dola": 1e3 * plain_statistics.median(dola), "ratio": ratio},
        baseline={"step_ms_plain": 1e3 * plain_statistics.median(plain)},
        holds=ratio <= ALLOWED_COST,
    )


def _step_times(methods: Sequence[Dola | None]) -> list[list[float]]:
    """Processor seconds of decoding steps by each method, one after the other in turn, of this thread."""
    model = load("ref")
    sides = []
    for method in methods:
        transforms = [] if method is None else list(method.transforms(model))
        distribution = Distribution([*transforms, Warp(Sampling())])
        reader = ModelReader(model, 1, exact_cache, distribution.exits)
        reader.prefill([list(range(100, 100 + CONTEXT))])
        sides.append((reader, distribution))
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(STEPS):
        for (reader, distribution), own in zip(sides, times, strict=True):
            start = time.thread_time()
            (rows,) = reader.read([[7]], [[-1]])
            distribution(rows, lambda row: [7])
            reader.commit([[0]])
            own.append(time.thread_time() - start)
    return times


def drafts_change_nothing() -> Outcome:
    model = model_of("ref")
    tokenizer = tokenizer_of(model)
    prompts = [tokenizer(example.prompt)["input_ids"] for example in questions("facts")[:TEXTS]]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    drafts = Speculative(draft="ref-mini", depth=DEPTH)
    drafted = Decoder(model, [Dola(), drafts], adapt=False).generate(prompts, sampling)
    plain = Decoder(model, [Dola()]).generate(prompts, sampling)
    same = sum(a == b for a, b in zip(drafted.tokens, plain.tokens, strict=True))
    return Outcome(
        measured={
            "texts_equal": float(same),
            "tokens_per_target_forward": drafted.ledger.tokens_per_target_forward,
        },
        baseline={"texts": float(TEXTS), "tokens_per_target_forward_plain": plain.ledger.tokens_per_target_forward},
        holds=same == TEXTS and drafted.ledger.tokens_per_target_forward > 1,
    )


_PAPER = method_info("dola").paper
_ASKED = f"{QUESTIONS} held-out questions, greedy, exact match to the end of the line"

CLAIMS = (
    Claim(
        "dola",
        _PAPER,
        "Contrasting the last layer with an early one makes a model say more true facts.",
        f"ref, and ref rounded to {BITS} bits, which has forgotten some facts; closed-book facts, and questions whose "
        f"context contradicts a fact; {_ASKED}. Holds if the rounded model answers more facts than by greedy decoding, "
        "the baseline (95 % interval of the differences, question by question).",
        more_facts,
    ),
    Claim(
        "dola",
        _PAPER,
        "Choosing the early layer for each token is better than any fixed one.",
        f"ref rounded to {BITS} bits, closed-book facts, {_ASKED}. Holds if choosing among blocks 1 to 7 is above the "
        "best of them fixed, the baseline (95 % interval of the differences, question by question).",
        chosen_beats_fixed,
    ),
    Claim(
        "dola",
        _PAPER,
        "It costs next to no time (1.01 to 1.08 times that of greedy decoding).",
        f"ref as it is loaded, in bfloat16, one text of {CONTEXT} tokens, {STEPS} steps of each in turn, processor "
        f"time of the thread. Holds if the median step takes at most {ALLOWED_COST} times that of plain decoding, the "
        "baseline.",
        small_cost,
    ),
    Claim(
        "dola",
        _PAPER,
        "It is a distribution like any other, so drafts make it faster and change no text.",
        f"ref in float32, greedy, {TEXTS} texts of {NEW_TOKENS} tokens, drafts of {DEPTH} tokens by ref-mini. Holds if "
        "all texts are those without drafts, the baseline, in fewer forward passes.",
        drafts_change_nothing,
    ),
)
