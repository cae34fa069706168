"""The stream of training text: which task comes next, and its documents without end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from trimtab.world import arithmetic, facts, formats, openbook, recall, sentiment
from trimtab.world.split import generator
from trimtab.world.types import Document, Split, text_of

WRITERS: dict[str, Callable[[random.Random, Split], Document]] = {
    "recall": recall.training_document,
    "facts": facts.training_document,
    "openbook": openbook.training_document,
    "format": formats.training_document,
    "arithmetic": arithmetic.training_document,
    "sentiment": sentiment.training_document,
}
"""For each task, the writer of one training document."""

DEFAULT_MIXTURE: dict[str, float] = {
    "recall": 0.15,
    "facts": 0.12,
    "openbook": 0.06,
    "format": 0.05,
    "arithmetic": 0.04,
    "sentiment": 0.03,
}
"""Shares by amount of text. The remaining 0.55 of the training text of ``ref`` is prose."""


class Balance:
    """Chooses the next source so that the realised amounts keep to the asked shares.

    Documents of different sources differ in length; drawing the *source* at random in proportion to
    the shares would realise other proportions. So the source furthest behind its share is next.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        if total <= 0 or min(shares.values()) < 0:
            raise ValueError(f"mixture: shares must be positive, not {dict(shares)}")
        self.shares = {name: share / total for name, share in shares.items() if share > 0}
        self.amounts = dict.fromkeys(self.shares, 0.0)

    def next(self) -> str:
        """The source furthest behind its share."""
        return min(self.shares, key=lambda name: self.amounts[name] / self.shares[name])

    def add(self, name: str, amount: float) -> None:
        """Count ``amount`` of text as taken from this source."""
        self.amounts[name] += amount


def annotated_documents(split: Split, seed: int, mixture: Mapping[str, float] | None = None) -> Iterator[Document]:
    """World documents without end, as spans that say which part is the answer."""
    mixture = DEFAULT_MIXTURE if mixture is None else mixture
    for task in mixture:
        if task not in WRITERS:
            raise ValueError(f"unknown task {task!r}; there are: {', '.join(WRITERS)}")
    balance = Balance(mixture)
    rng = generator("documents", split, seed)
    while True:
        task = balance.next()
        document = WRITERS[task](rng, split)
        balance.add(task, len(text_of(document)))
        yield document


def documents(split: Split, seed: int = 0, mixture: Mapping[str, float] | None = None) -> Iterator[str]:
    """World documents without end, as text; ``mixture`` gives the share of each task by length."""
    return map(text_of, annotated_documents(split, seed, mixture))
