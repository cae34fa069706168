"""What proposes: trees that follow the texts of a batch, and the reader of the model that drafts them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._distribution import Distribution
from trimtab.decoding._reader import Reader, Rows
from trimtab.decoding._tree import ROOT, DraftTree, Law


class Proposer(ABC):
    """Drafts a tree for each text.

    law        by which all its trees are drawn
    branches   its trees may branch
    depth      of its deepest trees
    """

    law: ClassVar[Law]
    branches: ClassVar[bool] = False
    depth: int

    @abstractmethod
    def propose(
        self, texts: Sequence[Sequence[int]], limits: Sequence[int], generators: Sequence[torch.Generator]
    ) -> list[DraftTree]:
        """A tree for each text, no deeper than its limit, which may be 0; one generator for each text."""

    def commit(self, trees: Sequence[DraftTree], paths: Sequence[Sequence[int]]) -> None:  # noqa: B027 (may be nothing)
        """These nodes of the trees of the last `propose` are now part of the texts."""

    def select(self, rows: Sequence[int]) -> None:  # noqa: B027
        """Text i is from now on what text rows[i] was."""

    @property
    def forwards(self) -> int:
        """Forward passes of the drafting model so far."""
        return 0


class ModelProposer(Proposer):
    """Drafts with a model, one forward pass for each level of the trees of all texts.

    A text is drafted for as far as the drafting model has positions; after that it gets no draft.

    new_reader     a reader for so many texts; made when the first draft is wanted
    distribution   that of the draft; what children are drawn from, and what the acceptance rule is told
    """

    def __init__(self, new_reader: Callable[[int], Reader], distribution: Distribution, depth: int) -> None:
        self.depth = depth
        self._new_reader = new_reader
        self._distribution = distribution
        self._reader: Reader | None = None
        self._read: list[_Read] = []

    @property
    def forwards(self) -> int:
        return 0 if self._reader is None else self._reader.forwards

    @abstractmethod
    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        """Add a level to the tree and return the nodes whose children the next level may be.

        leaves   node (ROOT at level 0) -> [V], the draft distribution after it: the nodes that the last call returned
        level    0 for what follows the text
        """

    def propose(
        self, texts: Sequence[Sequence[int]], limits: Sequence[int], generators: Sequence[torch.Generator]
    ) -> list[DraftTree]:
        trees = [DraftTree(self.law) for _ in texts]
        if min(self.depth, max(limits)) <= 0:
            return trees
        reader = self._reader or self._new_reader(len(texts))
        limits = [min(own, _room(text, reader)) for text, own in zip(texts, limits, strict=True)]
        deepest = min(self.depth, max(limits))
        if deepest <= 0:
            return trees
        if self._reader is None:
            self._reader = reader
            reader.prefill([text[:-1] if _room(text, reader) > 0 else [] for text in texts])
        # of a text without a draft nothing is read: its last token has to wait for the next draft, which follows it
        pending = [
            list(text[len(kept) :]) if limit > 0 else []
            for text, kept, limit in zip(texts, reader.texts, limits, strict=True)
        ]
        self._read = [_Read(len(own)) for own in pending]
        rows = reader.read(pending, [list(range(-1, len(own) - 1)) for own in pending])
        growing = [[ROOT] if limit > 0 else [] for limit in limits]
        found = [Rows(own.logits[-1:]) for own in rows]
        for level in range(deepest):
            if level:
                for row, nodes in enumerate(growing):
                    self._read[row].add(nodes)
                found = reader.read(
                    [[tree.tokens[node] for node in nodes] for tree, nodes in zip(trees, growing, strict=True)],
                    [
                        [self._read[row].place(trees[row].parents[node]) for node in nodes]
                        for row, nodes in enumerate(growing)
                    ],
                )
            probs = self._probs(found, texts, trees, growing)
            growing = [
                self.grow(tree, dict(zip(growing[row], probs[row], strict=True)), level, generators[row])
                if growing[row]
                else []
                for row, tree in enumerate(trees)
            ]
            # the deepest nodes are not read: nothing of the draft follows them
            growing = [nodes if level + 1 < limit else [] for nodes, limit in zip(growing, limits, strict=True)]
            if not any(growing):
                break
        return trees

    def _probs(
        self,
        rows: Sequence[Rows],
        texts: Sequence[Sequence[int]],
        trees: Sequence[DraftTree],
        nodes: Sequence[Sequence[int]],
    ) -> list[Tensor]:
        """For each text the draft distributions after these of its nodes."""
        return self._distribution.of_each(rows, lambda text, i: trees[text].prefix(texts[text], nodes[text][i]))

    def commit(self, trees: Sequence[DraftTree], paths: Sequence[Sequence[int]]) -> None:
        if self._reader is not None and self._read:
            self._reader.commit([read.kept(path) for read, path in zip(self._read, paths, strict=True)])
        self._read = []

    def select(self, rows: Sequence[int]) -> None:
        if self._reader is not None:
            self._reader.select(rows)


def _room(text: Sequence[int], reader: Reader) -> int:
    """How many tokens the reader's model can draft after a text: it reads all of them but the last."""
    return sys.maxsize if reader.positions is None else reader.positions - len(text) + 1


class _Read:
    """What the drafting model has read since the last commit: tokens of the text that it lagged behind, then nodes."""

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self._places: dict[int, int] = {}

    def add(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._places[node] = self._behind + len(self._places)

    def place(self, node: int) -> int:
        """Of a node among all drafted tokens."""
        return self._behind - 1 if node == ROOT else self._places[node]

    def kept(self, path: Sequence[int]) -> list[int]:
        """Places of the text's tokens and of those nodes of a path that were read."""
        return [*range(self._behind), *(self._places[node] for node in path if node in self._places)]
