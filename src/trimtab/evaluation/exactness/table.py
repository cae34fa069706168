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
        sizes = [vocabulary**level for level in range(depth)]
        self._tables = [_conditionals(random, size, vocabulary) for size in sizes]
        self._early = {place: [_conditionals(random, size, vocabulary) for size in sizes] for place in early}

    def rows(self, new: Sequence[Sequence[int]]) -> Rows:
        """After each of these sequences of new tokens."""
        early = {place: self._look_up(tables, new) for place, tables in self._early.items()}
        return Rows(self._look_up(self._tables, new), early)

    def _look_up(self, tables: Sequence[Tensor], new: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([tables[len(own) % self.depth][self._index(own)] for own in new])

    def _index(self, own: Sequence[int]) -> int:
        index = 0
        for token in own[len(own) - len(own) % self.depth :]:
            index = index * self.vocabulary + token
        return index


def _conditionals(random: np.random.Generator, rows: int, vocabulary: int) -> Tensor:
    drawn = random.dirichlet([CONCENTRATION] * vocabulary, size=rows)
    return torch.tensor(np.log(np.maximum(drawn, 1e-30)), dtype=torch.float32)


class TableReader:
    """A TableModel as a reader of texts; the first token of each text is its prompt."""

    def __init__(self, model: TableModel, rows: int) -> None:
        self.model = model
        self.vocabulary = model.vocabulary
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.forwards = 0
        self._drafts: list[list[list[int]]] = [[] for _ in range(rows)]

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]

    def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[Rows]:
        self.forwards += 1
        found = []
        for row, (own, before) in enumerate(zip(tokens, parents, strict=True)):
            drafts = self._drafts[row]
            for token, parent in zip(own, before, strict=True):
                if not ROOT <= parent < len(drafts):
                    raise DataError(f"drafted token {len(drafts)} follows token {parent}, which does not come before.")
                drafts.append([*(self.texts[row] if parent == ROOT else drafts[parent]), token])
            read = drafts[len(drafts) - len(own) :]
            found.append(
                self.model.rows([text[1:] for text in read]) if read else Rows(torch.empty(0, self.vocabulary))
            )
        return found

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for row, path in enumerate(paths):
            if path:
                self.texts[row] = self._drafts[row][path[-1]]
            self._drafts[row] = []

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [list(self.texts[row]) for row in rows]
        self._drafts = [[] for _ in rows]
