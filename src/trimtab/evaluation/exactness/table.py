"""A language model that is a table: five tokens, conditionals drawn from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.decoding._reader import Rows
from trimtab.decoding._tree import ROOT
from trimtab.models.early_exits import Exit

VOCABULARY = 5
CONCENTRATION = 0.7


class TableModel:
    """Log-probabilities of the next token after each text of at most `depth` new tokens; what came before is ignored.

    early   exits that answer too, each from a table of its own

    Beyond `depth` the tables start again, so that texts may be as long as one likes.
    """

    def __init__(self, seed: int, *, depth: int = 3, vocabulary: int = VOCABULARY, early: Sequence[Exit] = ()) -> None:
        self.depth = depth
        self.vocabulary = vocabulary
        random = np.random.default_rng(seed)
        sizes: list[int] = [vocabulary**level for level in range(depth)]
        self._starts = [sum(sizes[:level]) for level in range(depth)]
        self._tables = {layer: _conditionals(random, sum(sizes), vocabulary) for layer in (None, *early)}

    def rows(self, new: Sequence[Sequence[int]]) -> Rows:
        """After each of these sequences of new tokens."""
        index = torch.tensor([self._index(own) for own in new], dtype=torch.long)
        found = {layer: table[index] for layer, table in self._tables.items()}
        logits = found.pop(None)
        return Rows(logits, {layer: rows for layer, rows in found.items() if layer is not None})

    def _index(self, own: Sequence[int]) -> int:
        index, level = 0, len(own) % self.depth
        for token in own[len(own) - level :]:
            index = index * self.vocabulary + token
        return self._starts[level] + index


def _conditionals(random: np.random.Generator, rows: int, vocabulary: int) -> Tensor:
    drawn = random.dirichlet([CONCENTRATION] * vocabulary, size=rows)
    return torch.tensor(np.log(np.maximum(drawn, 1e-30)), dtype=torch.float32)


class TableReader:
    """A TableModel as a reader of texts; the first token of each text is its prompt."""

    def __init__(self, model: TableModel, rows: int) -> None:
        self.model = model
        self.vocabulary = model.vocabulary
        self.positions: int | None = None
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.forwards = 0
        self._drafts: list[list[list[int]]] = [[] for _ in range(rows)]

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]

    def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[Rows]:
        self.forwards += 1
        new: list[list[int]] = []
        for row, (own, before) in enumerate(zip(tokens, parents, strict=True)):
            drafts = self._drafts[row]
            for token, parent in zip(own, before, strict=True):
                if not ROOT <= parent < len(drafts):
                    raise DataError(f"drafted token {len(drafts)} follows token {parent}, which does not come before.")
                drafts.append([*(self.texts[row] if parent == ROOT else drafts[parent]), token])
            new += [text[1:] for text in drafts[len(drafts) - len(own) :]]
        return self.model.rows(new).split([len(own) for own in tokens])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for row, path in enumerate(paths):
            if path:
                self.texts[row] = self._drafts[row][path[-1]]
            self._drafts[row] = []

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [list(self.texts[row]) for row in rows]
        self._drafts = [[] for _ in rows]
