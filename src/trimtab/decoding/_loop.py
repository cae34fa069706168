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
from trimtab.decoding._reader import Reader
from trimtab.decoding._rules.base import AcceptanceRule
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

    `run` writes texts from beginning to end. A search goes step by step instead: `start`, then `advance` by some tokens
    and `select` the texts to go on with, as often as it likes, then `generation`.

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
        self.ledger = DecodingLedger()
        self.texts: list[Text] = []
        self._live: list[Text] = []  # those that the readers hold, in their order

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
        self.start(prompts, sampling, decode=decode, generators=generators)
        self.advance(on_tokens=on_tokens)
        return self.generation()

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        decode: Decode | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        """Read every prompt; what `texts` is from now on. Raises DataError for an empty one."""
        if not prompts or any(not prompt for prompt in prompts):
            raise DataError("a prompt holds no token; every text needs at least one to go on from.")
        self._ends = _Ends(sampling, decode)
        self._generators = list(sampling.generators(len(prompts)) if generators is None else generators)
        self._sampling = sampling
        self.texts = [Text(row, list(prompt)) for row, prompt in enumerate(prompts)]
        self._live = list(self.texts)
        self.ledger.note_prompts(prompts)
        with self.ledger.phase("prefill"):
            self._target.prefill([text.tokens[:-1] for text in self.texts])
        self._before = self._target.forwards

    def advance(self, tokens: int | None = None, *, on_tokens: OnTokens | None = None) -> None:
        """Write so many more tokens of each text (None: all), fewer of those that end."""
        most = self._sampling.max_new_tokens
        for text in self._live:
            text.goal = most if tokens is None else min(most, len(text.new) + tokens)
        while any(text.wants for text in self._live):
            start = time.perf_counter()
            drafts = self._controller.wants_draft() and self._proposer.depth > 0
            writing = [text for text in self._live if text.wants]
            new = self._round(drafts)
            written = sum(map(len, new)) / len(writing)
            self._controller.note(time.perf_counter() - start, written, drafted=drafts)
            if on_tokens is not None:
                for text, found in zip(writing, new, strict=True):
                    on_tokens(text.row, found)
            kept = [place for place, text in enumerate(self._live) if text.finish is None]
            if len(kept) < len(self._live):
                self._hold([self._live[place] for place in kept], kept)

    def select(self, rows: Sequence[int]) -> None:
        """Make text i what text rows[i] was; some may be left out and some come twice.

        Copies go on apart: chance belongs to the place. Text i draws from the generator of row i, whatever it was.
        """
        places = {text.row: place for place, text in enumerate(self._live)}
        self.texts = [self.texts[row].copy(place) for place, row in enumerate(rows)]
        if len(rows) > len(self._generators):
            self._generators += self._sampling.generators(len(rows))[len(self._generators) :]
        live = [text for text in self.texts if text.finish is None]
        self._hold(live, [places[rows[text.row]] for text in live])

    def generation(self) -> Generation:
        """What was written so far."""
        self.ledger.target_forwards = self._target.forwards - self._before
        self.ledger.draft_forwards = self._proposer.forwards
        return Generation([text.new for text in self.texts], [text.ended for text in self.texts], self.ledger)

    def _hold(self, live: list[Text], places: Sequence[int]) -> None:
        """Have the readers hold these texts, which are copies of those at `places`."""
        self._live = live
        if live:
            self._target.select(places)
            self._proposer.select(places)

    def _round(self, drafts: bool) -> list[list[int]]:
        """One forward pass of the target; returns the new tokens of each text that wants some.

        Texts that wait for others to come as far read nothing.
        """
        live, ledger = self._live, self.ledger
        with ledger.phase("draft"):
            # the token after the last drafted one comes from the target
            limits = [text.left - 1 if drafts and text.wants else 0 for text in live]
            generators = [self._generators[text.row] for text in live]
            trees = (self._proposer if drafts else _NO_DRAFT).propose(
                [text.tokens for text in live], limits, generators
            )
        with ledger.phase("verify"):
            rows = self._target.read(
                [[text.tokens[-1], *tree.tokens] if text.wants else [] for text, tree in zip(live, trees, strict=True)],
                [
                    [ROOT, *(parent + 1 for parent in tree.parents)] if text.wants else []
                    for text, tree in zip(live, trees, strict=True)
                ],
            )
        with ledger.phase("accept"):
            tokens = [text.tokens for text in live]
            probs = self._distribution.of_each(rows, lambda text, row: trees[text].prefix(tokens[text], row - 1))
            walks = [
                self._rule.walk(tree, own, self._generators[text.row]) if text.wants else None
                for tree, own, text in zip(trees, probs, live, strict=True)
            ]
        with ledger.phase("commit"):
            self._target.commit([[0, *(node + 1 for node in walk.path)] if walk else [] for walk in walks])
            self._proposer.commit(trees, [walk.path if walk else () for walk in walks])
            new = []
            for text, tree, walk in zip(live, trees, walks, strict=True):
                if walk is None:
                    continue
                new.append(self._ends.append(text, [*(tree.tokens[node] for node in walk.path), walk.next_token]))
                ledger.note_round(tree, walk.path, len(new[-1]))
        return new


_NO_DRAFT = NoDraft()


@dataclass
class Text:
    """One text of the batch.

    row     its place, and the number of its generator
    tokens  prompt and what was written
    new     what was written, the end of `tokens`
    goal    tokens to write before it waits
    finish  why it ended; None: it has not
    """

    row: int
    tokens: list[int]
    new: list[int] = field(default_factory=list)
    goal: int = 0
    finish: Finish | None = None

    @property
    def left(self) -> int:
        """Tokens that may come before it waits."""
        return self.goal - len(self.new)

    @property
    def wants(self) -> bool:
        """It is neither over nor waiting."""
        return self.finish is None and self.left > 0

    @property
    def ended(self) -> Finish:
        assert self.finish is not None, "the loop goes on until all texts have ended"
        return self.finish

    def copy(self, row: int) -> Text:
        return Text(row, list(self.tokens), list(self.new), self.goal, self.finish)


class _Ends:
    """When a text is over. Raises ConfigError for stop strings that nothing can read."""

    def __init__(self, sampling: Sampling, decode: Decode | None) -> None:
        if sampling.stop_strings and decode is None:
            raise ConfigError("stop_strings need a tokenizer that shows tokens as text.")
        self._sampling = sampling
        self._decode = decode

    def append(self, text: Text, found: list[int]) -> list[int]:
        """Add those of the tokens that come before the text's end; returns them."""
        kept = found[: text.left]
        if (count := cut_at(kept, self._sampling.stop_tokens)) is not None:
            kept, text.finish = kept[:count], "stop_token"
        elif (count := self._until_stop_string(text, kept)) is not None:
            kept, text.finish = kept[:count], "stop_string"
        text.tokens += kept
        text.new += kept
        if text.finish is None and len(text.new) == self._sampling.max_new_tokens:
            text.finish = "length"
        return kept

    def _until_stop_string(self, text: Text, found: Sequence[int]) -> int | None:
        """Number of tokens after which a stop string is complete."""
        for count in range(1, len(found) + 1 if self._sampling.stop_strings else 0):
            assert self._decode is not None
            written = self._decode([*text.new, *found[:count]])
            if any(stop in written for stop in self._sampling.stop_strings):
                return count
        return None
