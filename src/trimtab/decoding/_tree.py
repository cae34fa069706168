"""A draft tree: tokens proposed to follow one text, how they branch, and by which law they were drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Law = Literal["iid", "gumbel_swor", "deterministic"]
"""How the children of a node came about; an acceptance rule is exact for some laws only.

iid             independent draws from the node's draft distribution; a token drawn m times has multiplicity m
gumbel_swor     draws without replacement, in the order of their ranks
deterministic   named, not drawn: what follows has nothing to do with chance
"""
ROOT = -1
"""The last token of the text, as a parent."""


@dataclass
class DraftTree:
    """Proposed tokens of one text, parents before children.

    law            of all children of all nodes
    tokens         [N] token ids
    parents        [N] index of the node before; ROOT for those that follow the text
    ranks          [N] place among the siblings: the order in which they are tried
    multiplicity   [N] how often it was drawn
    draft_probs    node (ROOT: the text) -> [V] float32, the distribution that its children were really drawn from
    values         node -> what its proposer ranks it by, where that is more than the order of siblings
    """

    law: Law
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    multiplicity: list[int] = field(default_factory=list)
    draft_probs: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, *, rank: int = 0, multiplicity: int = 1) -> int:
        """Append a node and return its index."""
        assert ROOT <= parent < len(self.tokens), "parents come before children"
        self.tokens.append(token)
        self.parents.append(parent)
        self.ranks.append(rank)
        self.multiplicity.append(multiplicity)
        return len(self.tokens) - 1

    def children(self, node: int) -> list[int]:
        """In the order of their ranks."""
        found = [child for child, parent in enumerate(self.parents) if parent == node]
        return sorted(found, key=self.ranks.__getitem__)

    def path(self, node: int) -> list[int]:
        """Nodes from the first after the text to this one; empty for ROOT."""
        found: list[int] = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def depths(self) -> list[int]:
        """[N], 1 for what follows the text directly."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent == ROOT else found[parent] + 1)
        return found

    def prefix(self, text: Sequence[int], node: int) -> list[int]:
        """The text and the tokens up to and with a node."""
        return [*text, *(self.tokens[n] for n in self.path(node))]
