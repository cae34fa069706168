"""The decoding loop: propose, verify, transform, accept, commit, for a batch of texts until all have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from trimtab.core.errors import ConfigError, DataError
from trimtab.decoding._controller import Controller
from trimtab.decoding._distribution import Distribution
from trimtab.decoding._ledger import DecodingLedger
from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._reader import Reader, Rows
from trimtab.decoding._rules.base import AcceptanceRule, Walk
from trimtab.decoding._sampling import Sampling, cut_at
from trimtab.decoding._tree import ROOT, DraftTree, Law

Finish = Literal["length", "stop_token", "stop_string", "decision"]
"""`decision`: the text was chosen, whole, by a method that searches."""
OnTokens = Callable[[int, Sequence[int]], None]
"""Called with the row and its new tokens after each round."""
Decode = Callable[[Sequence[int]], str]
"""Tokens as text."""


@dataclass
class Generation:
    """What was written after each text.

    tokens     for each text its new tokens, with the stop token if it came to one
    finishes   why each of them ended
    ledger     what it cost
    """

    tokens: list[list[int]]
    finishes: list[Finish]
    ledger: DecodingLedger = field(default_factory=DecodingLedger)


class NoDraft(Proposer):
    """Drafts nothing: plain decoding."""

    law: ClassVar[Law] = "deterministic"
    depth = 0

    def propose(
        self, texts: Sequence[Sequence[int]], limits: Sequence[int], generators: Sequence[torch.Generator]
    ) -> list[DraftTree]:
        return [DraftTree(self.law) for _ in texts]


class Loop:
    """Decode with one target. Rows of a batch do not influence each other: what they draw, and when they end.

    target         reader of the model whose distribution is decoded, for as many texts as there are
    distribution   what its rows become
    proposer       of drafts
    rule           of acceptance; refused if it is not exact for the proposer's drafts
    controller     of whether a round has a draft

    Raises CompositionError where rule and proposer do not fit.
    """

    def __init__(
        self,
        target: Reader,
        distribution: Distribution,
        proposer: Proposer,
        rule: AcceptanceRule,
        controller: Controller | None = None,
    ) -> None:
        rule.check(proposer)
        self._target = target
        self._distribution = distribution
        self._proposer = proposer
        self._rule = rule
        self._controller = Controller(fixed=True) if controller is None else controller

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        decode: Decode | None = None,
        on_tokens: OnTokens | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Generation:
        """Continue every prompt. `decode` is needed for stop strings.

        generators   one for each prompt; None: those of `sampling`

        Raises DataError for an empty prompt.
        """
        if not prompts or any(not prompt for prompt in prompts):
            raise DataError("a prompt holds no token; every text needs at least one to go on from.")
        generators = sampling.generators(len(prompts)) if generators is None else generators
        texts = [_Text(row, list(prompt), generators[row]) for row, prompt in enumerate(prompts)]
        ends = _Ends(sampling, decode)
        ledger = DecodingLedger()
        ledger.note_prompts(prompts)
        with ledger.phase("prefill"):
            self._target.prefill([text.tokens[:-1] for text in texts])
        before, live = self._target.forwards, list(texts)
        while live:
            start = time.perf_counter()
            drafts = self._controller.wants_draft() and self._proposer.depth > 0
            new = self._round(live, ends, drafts, ledger)
            self._controller.note(time.perf_counter() - start, sum(map(len, new)) / len(live), drafted=drafts)
            if on_tokens is not None:
                for text, tokens in zip(live, new, strict=True):
                    on_tokens(text.row, tokens)
            kept = [place for place, text in enumerate(live) if text.finish is None]
            if len(kept) < len(live):
                live = [live[place] for place in kept]
                if live:
                    self._target.select(kept)
                    self._proposer.select(kept)
        ledger.target_forwards = self._target.forwards - before
        ledger.draft_forwards = self._proposer.forwards
        return Generation([text.new for text in texts], [text.ended for text in texts], ledger)

    def _round(self, live: Sequence[_Text], ends: _Ends, drafts: bool, ledger: DecodingLedger) -> list[list[int]]:
        """One forward pass of the target; returns the new tokens of each text."""
        with ledger.phase("draft"):
            tokens = [text.tokens for text in live]
            # the token after the last drafted one comes from the target
            limits = [ends.left(text) - 1 if drafts else 0 for text in live]
            trees = (self._proposer if drafts else _NO_DRAFT).propose(tokens, limits, [text.generator for text in live])
        with ledger.phase("verify"):
            rows = self._target.read(
                [[text.tokens[-1], *tree.tokens] for text, tree in zip(live, trees, strict=True)],
                [[ROOT, *(parent + 1 for parent in tree.parents)] for tree in trees],
            )
        with ledger.phase("accept"):
            walks = [self._walk(*each) for each in zip(live, trees, rows, strict=True)]
        with ledger.phase("commit"):
            self._target.commit([[0, *(node + 1 for node in walk.path)] for walk in walks])
            self._proposer.commit(trees, [walk.path for walk in walks])
            new = []
            for text, tree, walk in zip(live, trees, walks, strict=True):
                found = [*(tree.tokens[node] for node in walk.path), walk.next_token]
                new.append(ends.append(text, found))
                ledger.note_round(tree, walk.path, len(new[-1]))
        return new

    def _walk(self, text: _Text, tree: DraftTree, rows: Rows) -> Walk:
        nodes = list(tree.nodes())
        probs = self._distribution(rows, lambda i: [*text.tokens, *(tree.tokens[n] for n in tree.path(nodes[i]))])
        return self._rule.walk(tree, probs, text.generator)


_NO_DRAFT = NoDraft()


@dataclass
class _Text:
    """One text of the batch. `new` is what was written, the end of `tokens`."""

    row: int
    tokens: list[int]
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def ended(self) -> Finish:
        assert self.finish is not None, "the loop goes on until all texts have ended"
        return self.finish


class _Ends:
    """When a text is over. Raises ConfigError for stop strings that nothing can read."""

    def __init__(self, sampling: Sampling, decode: Decode | None) -> None:
        if sampling.stop_strings and decode is None:
            raise ConfigError("stop_strings need a tokenizer that shows tokens as text.")
        self._sampling = sampling
        self._decode = decode

    def left(self, text: _Text) -> int:
        """Tokens that may still come."""
        return self._sampling.max_new_tokens - len(text.new)

    def append(self, text: _Text, found: list[int]) -> list[int]:
        """Add those of the tokens that come before the text's end; returns them."""
        kept = found[: self.left(text)]
        if (count := cut_at(kept, self._sampling.stop_tokens)) is not None:
            kept, text.finish = kept[:count], "stop_token"
        elif (count := self._until_stop_string(text, kept)) is not None:
            kept, text.finish = kept[:count], "stop_string"
        text.tokens += kept
        text.new += kept
        if text.finish is None and not self.left(text):
            text.finish = "length"
        return kept

    def _until_stop_string(self, text: _Text, found: Sequence[int]) -> int | None:
        """Number of tokens after which a stop string is complete."""
        for count in range(1, len(found) + 1 if self._sampling.stop_strings else 0):
            assert self._decode is not None
            written = self._decode([*text.new, *found[:count]])
            if any(stop in written for stop in self._sampling.stop_strings):
                return count
        return None
