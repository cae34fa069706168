"""Estimate what a model believes of its answers: score all labels there are, or draw some answers.

What that costs joins the list `spent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from trimtab.core.errors import DataError
from trimtab.decoding._decisions.labels import Continuations, LabelTrie, log_probabilities
from trimtab.decoding._decisions.outcomes import Outcomes, Parse
from trimtab.decoding._decisions.rules import Array
from trimtab.decoding._decoder import Decoder
from trimtab.decoding._ledger import DecodingLedger
from trimtab.decoding._loop import Finish, Generation
from trimtab.decoding._sampling import Sampling
from trimtab.models import tokenizer_of

Weighting = Literal["counts", "importance", "probability"]
_ROWS = 256
"""Texts that are written at once."""
MODEL = Sampling(temperature=1.0)
"""The distribution of which expectations are meant: the model's own, with the transforms of other methods."""


def scored(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
    *,
    lead: str,
    end: str,
    parse: Parse,
    spent: list[DecodingLedger],
) -> list[Outcomes]:
    """The probabilities of lead + label + end, made to sum to 1 over the labels.

    Raises DataError for labels that are beginnings of one another, and for labels none of which is possible.
    """
    written = Continuations(tokenizer_of(decoder.model), [f"{lead}{label}{end}" for label in labels])
    known: dict[int, LabelTrie] = {}
    for prompt in prompts:
        if prompt[-1] not in known:
            known[prompt[-1]] = LabelTrie.of(written.after(prompt), labels)
    tries = [known[prompt[-1]] for prompt in prompts]
    decoder.check_length(prompts, Sampling(max_new_tokens=max(trie.depth for trie in tries)))
    found = log_probabilities(decoder, prompts, tries, [decoder.distribution(MODEL)], spent)
    return [Outcomes.of(labels, _shares(own), parse, mass=float(np.exp(own).sum())) for (own,) in found]


def sampled(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: int,
    *,
    end: str,
    parse: Parse,
    weighting: Weighting,
    with_greedy: bool,
    spent: list[DecodingLedger],
) -> list[Outcomes]:
    """Answers drawn with `sampling` until they come to `end`; those that do not are dropped, as is what is no answer.

    counts        each draw counts alike: for draws at temperature 1 without warps
    importance    by p / r of the model's probability and that of the draw: self-normalised importance sampling
    probability   each different text once, by the model's probability
    with_greedy   the greedy answer is among the values, with no weight of its own

    Draws of a prompt share the reading of it. Raises DataError where no draw is an answer.
    """
    own = replace(sampling, stop_strings=(*sampling.stop_strings, *([end] if end else [])))
    done = _write(decoder, prompts, own, draws, spent)
    greedy = _write(decoder, prompts, own.at(0.0), 1, spent) if with_greedy else [Generation([], [])] * len(prompts)
    weights = [np.ones(draws)] * len(prompts)
    if weighting != "counts":
        weights = _reweighted(decoder, prompts, [found.tokens for found in done], own, weighting, spent)
    outcomes = []
    for texts, shares, best in zip(done, weights, greedy, strict=True):
        answers = _answers(decoder, texts, end)
        extra = [text for text in _answers(decoder, best, end) if parse(text) is not None]
        dropped = sum(parse(text) is None for text in answers)
        spread = np.concatenate([shares, np.zeros(len(extra))])
        outcomes.append(Outcomes.of([*answers, *extra], spread, parse, mass=1 - dropped / draws))
    return outcomes


def _write(
    decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: int, spent: list[DecodingLedger]
) -> list[Generation]:
    """`draws` texts for each prompt. Each has a generator of its own, so the size of a batch changes nothing."""
    rows = [prompt for prompt in prompts for _ in range(draws)]
    generators = sampling.generators(len(rows))
    together = max(_ROWS // draws * draws, min(_ROWS, draws))  # all draws of a prompt, or some of a single one's
    tokens: list[list[int]] = []
    finishes: list[Finish] = []
    for start in range(0, len(rows), together):
        own = rows[start : start + together]
        done = decoder.loop(len(own), sampling).run(
            own, sampling, decode=decoder.decode, generators=generators[start : start + together]
        )
        spent.append(done.ledger)
        tokens += done.tokens
        finishes += done.finishes
    return [Generation(tokens[i : i + draws], finishes[i : i + draws]) for i in range(0, len(rows), draws)]


def _answers(decoder: Decoder, found: Generation, end: str) -> list[str]:
    """What was written before `end`; nothing of texts that did not come to it."""
    texts = [decoder.decode(tokens) for tokens in found.tokens]
    if not end:
        return texts
    return [
        text.split(end)[0] if finish != "length" else "" for text, finish in zip(texts, found.finishes, strict=True)
    ]


def _reweighted(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling,
    weighting: Weighting,
    spent: list[DecodingLedger],
) -> list[Array]:
    """Weights of the draws [n] of each prompt, from the probabilities of all different ones in one tree."""
    different = [list(dict.fromkeys(map(tuple, texts))) for texts in drawn]
    tries = [LabelTrie.of(texts, list(map(str, texts))) for texts in different]
    distributions = [decoder.distribution(MODEL), decoder.distribution(sampling)]
    found = log_probabilities(decoder, prompts, tries, distributions, spent)
    weights = []
    for texts, own, (model, draw) in zip(drawn, different, found, strict=True):
        places = [own.index(tuple(text)) for text in texts]
        if weighting == "importance":
            weights.append(_shares((model - draw)[places]))
            continue
        first = [place not in places[:draw_index] for draw_index, place in enumerate(places)]
        weights.append(_shares(np.where(first, model[places], -np.inf)))
    return weights


def _shares(log_weights: Array) -> Array:
    """exp of each over their sum, [n]. Raises DataError where all are impossible."""
    highest = float(log_weights.max())
    if not np.isfinite(highest):
        raise DataError("none of the answers is possible: the model gives each of them probability 0.")
    shares = np.exp(log_weights - highest)
    return np.asarray(shares / shares.sum(), dtype=np.float64)
