"""Chunk-level beam search: sample a few tokens in several ways, keep the best texts, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab.decoding._loop import Decode, Generation, Loop, Text
from trimtab.decoding._sampling import Sampling


class SegmentScorer(Protocol):
    """Says how good texts are so far. It follows the same texts as they grow, so it may read each token once."""

    @property
    def forwards(self) -> int:
        """Forward passes of its models so far."""

    def start(self, texts: Sequence[Text]) -> None:
        """These texts, of which nothing is written yet, are what will be scored. Comes first, and once."""

    def score(self, texts: Sequence[Text]) -> list[float]:
        """Of what was written; larger is better."""

    def select(self, rows: Sequence[int]) -> None:
        """Text i is from now on what text rows[i] was; some may be left out and some come twice."""


@dataclass(frozen=True)
class ChunkSearch:
    """CBS(W, K, L) of Zhou et al. 2024, algorithm 1.

    width            W, texts that are kept of each prompt
    successors       K, continuations of each
    chunk            L, tokens of a continuation; None: all, which makes it a choice of the best of W K samples
    dedupe_finished  a text that has ended stands once among the candidates; False: K times, as in the authors' code,
                     where copies of one ended text may crowd out the others
    """

    width: int
    successors: int
    chunk: int | None
    dedupe_finished: bool = True

    def run(
        self,
        loop: Loop,
        scorer: SegmentScorer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        decode: Decode | None = None,
    ) -> Generation:
        """The best text for each prompt; the ledger counts all that were tried.

        loop   for as many texts as there are prompts

        Each prompt has W K places, each with a generator of its own; what is kept goes on in the first W of them and in
        copies b0 .. bW-1, b0 .. bW-1 and so on.
        """
        places = self.width * self.successors
        loop.start(prompts, sampling, decode=decode)
        scorer.start(loop.texts)
        self._select(loop, scorer, [prompt for prompt in range(len(prompts)) for _ in range(places)])
        while True:
            before = [text.finish is not None for text in loop.texts]
            loop.advance(self.chunk)
            with loop.ledger.phase("score"):
                scores = scorer.score(loop.texts)
            kept: list[list[int]] = []
            for first in range(0, len(loop.texts), places):
                candidates = [
                    first + place
                    for place in range(places)
                    if place < self.width or not (self.dedupe_finished and before[first + place])
                ]
                kept.append(sorted(candidates, key=lambda row: -scores[row])[: self.width])
            if all(loop.texts[row].finish is not None for own in kept for row in own):
                break
            self._select(loop, scorer, [row for own in kept for row in own * self.successors])
        loop.select([own[0] for own in kept])
        loop.ledger.score_forwards = scorer.forwards
        return loop.generation()

    def _select(self, loop: Loop, scorer: SegmentScorer, rows: Sequence[int]) -> None:
        loop.select(rows)
        scorer.select(rows)
