"""What a generation cost, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from trimtab.decoding._tree import DraftTree

Phase = Literal["prefill", "draft", "verify", "accept", "commit", "score"]


@dataclass
class DecodingLedger:
    """Counts of one generation, over all texts of the batch.

    prompts              prompts read before the first round; equal ones are read once
    prompt_tokens        their tokens; the last one of each is left to the first round
    rounds               a text that takes part in a target forward pass counts one round
    target_forwards      forward passes of the target, without the prompt's
    draft_forwards       forward passes of the draft, its prompt's included
    plain_rounds         rounds without a draft
    nodes_scored         tokens that target forward passes read, the last of each text included
    committed            tokens that became text
    drafted_by_depth     nodes drafted at depth 1, 2, ...; tokens drawn several times count once
    accepted_by_depth    those that became text
    accepted_by_rank     by their place among their siblings
    score_forwards       forward passes of the models by which a search chooses among texts
    seconds              by phase: prefill, draft, verify, accept, commit, score
    """

    prompts: int = 0
    prompt_tokens: int = 0
    rounds: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    plain_rounds: int = 0
    nodes_scored: int = 0
    committed: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    accepted_by_rank: list[int] = field(default_factory=list)
    score_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_target_forward(self) -> float:
        """Committed tokens of a text per forward pass that it took part in: the block efficiency, 1 for plain
        decoding."""
        return self.committed / self.rounds if self.rounds else 0.0

    @classmethod
    def sum(cls, ledgers: Sequence[DecodingLedger]) -> DecodingLedger:
        """One ledger for several generations."""
        total = cls()
        for ledger in ledgers:
            for name, value in vars(ledger).items():
                setattr(total, name, _added(getattr(total, name), value))
        return total

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the seconds that the body takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def note_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """These are read before the first round, but for their last tokens."""
        different = {tuple(prompt[:-1]) for prompt in prompts if len(prompt) > 1}
        self.prompts += len(different)
        self.prompt_tokens += sum(map(len, different))

    def note_round(self, tree: DraftTree, path: Sequence[int], committed: int) -> None:
        """One text's share of a target forward pass."""
        self.rounds += 1
        self.plain_rounds += not len(tree)
        self.nodes_scored += 1 + len(tree)
        self.committed += committed
        for depth in tree.depths():
            _count(self.drafted_by_depth, depth - 1)
        for depth, node in enumerate(path):
            _count(self.accepted_by_depth, depth)
            _count(self.accepted_by_rank, tree.ranks[node])

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with `tokens_per_target_forward`."""
        return asdict(self) | {"tokens_per_target_forward": self.tokens_per_target_forward}


def _added(total: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: total.get(name, 0.0) + value.get(name, 0.0) for name in {**total, **value}}
    if isinstance(value, list):
        pairs = zip_longest(total, value, fillvalue=0)
        return [a + b for a, b in pairs]
    return total + value


def _count(counts: list[int], place: int) -> None:
    counts.extend([0] * (place + 1 - len(counts)))
    counts[place] += 1
