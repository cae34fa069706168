"""How many tokens drafts save: tokens per forward pass of the target, for shapes of drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.decoding import Decoder, DecodingLedger, RsdC, RsdS, Sampling, Spectr, Speculative
from trimtab.decoding.base import DecodingMethod
from trimtab.evaluation.base import Estimate
from trimtab.evaluation.kl import window_tokens
from trimtab.evaluation.statistics import mean
from trimtab.models import load, tokenizer_of

TARGET, DRAFT = "ref", "ref-mini"
TEXTS, PROMPT_TOKENS, NEW_TOKENS = 24, 48, 48
WIDTHS, DEPTHS = (2, 4, 8), (2, 4, 6)


@dataclass(frozen=True)
class Acceptance:
    """per_text: for each text its new tokens per forward pass that it took part in; ledger: of all of them."""

    per_text: list[float]
    ledger: DecodingLedger

    @property
    def estimate(self) -> Estimate:
        """Tokens per forward pass, the mean over texts."""
        return mean(self.per_text)

    def gain(self, other: Acceptance) -> Estimate:
        """By how much it is more than another's, paired by text."""
        return mean([a - b for a, b in zip(self.per_text, other.per_text, strict=True)])

    @property
    def nodes_per_forward(self) -> float:
        """Tokens that the target reads of a text in one forward pass."""
        return self.ledger.nodes_scored / self.ledger.rounds


def acceptance(
    model: PreTrainedModel,
    method: DecodingMethod,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    drafts: Mapping[str, PreTrainedModel],
) -> Acceptance:
    """Continue the prompts with a draft in every round, as one batch."""
    rounds = [0] * len(prompts)

    def count(row: int, new: Sequence[int]) -> None:
        rounds[row] += 1

    done = Decoder(model, [method], drafts=drafts, adapt=False).generate(prompts, sampling, on_tokens=count)
    per_text = [len(tokens) / taken for tokens, taken in zip(done.tokens, rounds, strict=True)]
    return Acceptance(per_text, done.ledger)


def prose_prompts(model: PreTrainedModel, count: int = TEXTS) -> list[list[int]]:
    """Beginnings of held-out prose."""
    found: list[list[int]] = window_tokens(model, tokenizer_of(model), None, count, PROMPT_TOKENS - 1, 0).tolist()
    return found


def shapes(draft: str) -> Iterator[tuple[DecodingMethod, int, int]]:
    """Methods with the number of their sequences and their depth."""
    for depth in DEPTHS:
        yield Speculative(draft=draft, depth=depth), 1, depth
        yield Speculative(draft=draft, depth=depth, rule="block"), 1, depth
        for width in WIDTHS:
            yield Spectr(draft=draft, k=width, depth=depth), width, depth
            yield RsdC(draft=draft, branching=(width, *[1] * (depth - 1))), width, depth
            yield RsdS(draft=draft, width=width, depth=depth), width, depth


def curve(tell: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per forward pass of `ref` with `ref-mini` as its draft, over the number of sequences and their depth."""
    model, draft = (load(name, dtype=torch.float32) for name in (TARGET, DRAFT))
    sampling = Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS)
    prompts, entries = prose_prompts(model), []
    for method, sequences, depth in shapes(DRAFT):
        found = acceptance(model, method, prompts, sampling, {DRAFT: draft})
        entries.append(
            {
                "method": type(method).name(),
                "options": method.to_dict(),
                "sequences": sequences,
                "depth": depth,
                "tokens_per_target_forward": found.estimate.to_dict(),
                "nodes_per_forward": found.nodes_per_forward,
                "ledger": found.ledger.to_dict(),
            }
        )
        tell(f"{type(method).name()} {sequences} x {depth}: {found.estimate.value:.2f} tokens per forward pass")
    setting = {"target": TARGET, "draft": DRAFT, "texts": TEXTS, "prompt_tokens": PROMPT_TOKENS}
    return {**setting, "new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 0, "entries": entries}
