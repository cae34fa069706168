"""What drafts cost where they do not pay: decoding under the controller beside plain decoding, text by text in turn.

Good and useless drafts, on prompts that are easy to draft for and on some that are not, with a target for which a
forward pass over several tokens costs little more than over one, and with one for which it does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab import world
from trimtab.decoding import Decoder, RsdS, Sampling, Speculative
from trimtab.decoding.base import DecodingMethod
from trimtab.evaluation.decoding_speed.sessions import untrained
from trimtab.evaluation.decoding_speed.widened import widen
from trimtab.evaluation.kl import window_tokens
from trimtab.models import load, tokenizer_of

MILLION_WEIGHTS = 250
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 10, 64, 96
PROMPTS_WIDENED = 3
"""Texts of each kind; of the large target fewer, which takes longer for each and is disturbed less."""
METHODS: Mapping[str, DecodingMethod] = {
    "speculative ref-mini": Speculative(draft="ref-mini", depth=5),
    "rsd_s ref-mini": RsdS(draft="ref-mini", width=4, depth=5),
    "speculative n-grams": Speculative(draft="ngram", depth=5),
    "speculative untrained": Speculative(draft="untrained", depth=5),
    "rsd_s untrained": RsdS(draft="untrained", width=4, depth=5),
}
"""The last two draft nothing that is ever accepted, at the price of a real draft."""


def prompt_sets(model: PreTrainedModel) -> dict[str, list[list[int]]]:
    """Held-out prose; questions of the small world; a text that repeats itself; tokens that mean nothing."""
    tokenizer = tokenizer_of(model)
    prose = window_tokens(model, tokenizer, None, PROMPTS, PROMPT_TOKENS - 1, 0).tolist()
    questions = [list(tokenizer(own.prompt)["input_ids"]) for own in world.examples("facts", "eval", PROMPTS, 0)]
    drawn = torch.randint(300, len(tokenizer), (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    repeating = [(text[:8] * PROMPT_TOKENS)[:PROMPT_TOKENS] for text in prose]
    return {"prose": prose, "questions": questions, "repetition": repeating, "random tokens": drawn.tolist()}


def survey(tell: Callable[[str], None]) -> dict[str, Any]:
    """Seconds with the controller over seconds of plain decoding, for each target, method and set of prompts:
    the median over its texts, and the ratio of the sums."""
    draft = load("ref-mini", dtype=torch.bfloat16)
    drafts = {"ref-mini": draft, "untrained": untrained(draft, 0)}
    entries = []
    for target in ("ref", f"ref, widened by {MILLION_WEIGHTS} million weights"):
        model = load("ref", dtype=torch.bfloat16)
        if target != "ref":
            widen(model, MILLION_WEIGHTS * 1_000_000)
        sets = prompt_sets(model)
        if target != "ref":
            sets = {name: texts[:PROMPTS_WIDENED] for name, texts in sets.items()}
        for name, method in METHODS.items():
            for prompts, texts in sets.items():
                entry = {"target": target, "method": name, "prompts": prompts} | _compared(model, method, drafts, texts)
                entries.append(entry)
                tell(f"{target}, {name}, {prompts}: {entry['seconds_ratio']:.3f} of plain decoding's time")
    setting = {
        "texts": [PROMPTS, PROMPTS_WIDENED],
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "temperature": 0,
        "seed": 0,
    }
    return {**setting, "entries": entries}


def _compared(
    model: PreTrainedModel,
    method: DecodingMethod,
    drafts: Mapping[str, PreTrainedModel],
    texts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    plain, controlled = Decoder(model), Decoder(model, [method], drafts=drafts)
    for decoder in (plain, controlled):
        decoder.generate(texts[:1], Sampling(max_new_tokens=8))
    seconds: dict[Decoder, list[float]] = {plain: [], controlled: []}
    rounds = plain_rounds = 0
    for turn, text in enumerate(texts):
        for decoder in (plain, controlled) if turn % 2 else (controlled, plain):
            start = time.perf_counter()
            done = decoder.generate([text], sampling)
            seconds[decoder].append(time.perf_counter() - start)
            if decoder is controlled:
                rounds, plain_rounds = rounds + done.ledger.rounds, plain_rounds + done.ledger.plain_rounds
    ratios = [a / b for a, b in zip(seconds[controlled], seconds[plain], strict=True)]
    return {
        "seconds_ratio": sum(seconds[controlled]) / sum(seconds[plain]),
        "seconds_ratio_median": statistics.median(ratios),
        "plain_seconds": sum(seconds[plain]),
        "share_of_rounds_with_draft": 1 - plain_rounds / rounds,
    }
