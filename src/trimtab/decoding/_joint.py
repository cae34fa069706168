"""Several models that read the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trimtab.decoding._reader import Reader, Rows


class JointReader:
    """A reader whose rows hold the logits of other readers too. Forward passes are the first one's."""

    def __init__(self, first: Reader, others: Mapping[str, Reader]) -> None:
        self._first = first
        self._others = dict(others)
        self.vocabulary = first.vocabulary
        limits = [reader.positions for reader in (first, *others.values()) if reader.positions is not None]
        self.positions = min(limits, default=None)

    @property
    def texts(self) -> list[list[int]]:
        return self._first.texts

    @property
    def forwards(self) -> int:
        return self._first.forwards

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        for reader in (self._first, *self._others.values()):
            reader.prefill(texts)

    def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[Rows]:
        own = self._first.read(tokens, parents)
        others = {name: reader.read(tokens, parents) for name, reader in self._others.items()}
        return [
            replace(rows, others={name: found[row].logits for name, found in others.items()})
            for row, rows in enumerate(own)
        ]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for reader in (self._first, *self._others.values()):
            reader.commit(paths)

    def select(self, rows: Sequence[int]) -> None:
        for reader in (self._first, *self._others.values()):
            reader.select(rows)
