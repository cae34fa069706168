"""Several sequences, drawn independently of each other, as one trie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._distribution import Distribution
from trimtab.decoding._proposers.base import ModelProposer
from trimtab.decoding._reader import Reader
from trimtab.decoding._sampling import draw
from trimtab.decoding._tree import ROOT, DraftTree, Law


class Sequences(ModelProposer):
    """`count` sequences of `depth` tokens (Sun et al. 2023). What they have in common is read once; the multiplicity
    of a node says how many of them go through it."""

    law: ClassVar[Law] = "iid"
    branches: ClassVar[bool] = True

    def __init__(self, new_reader: Callable[[int], Reader], distribution: Distribution, depth: int, count: int) -> None:
        super().__init__(new_reader, distribution, depth)
        self._count = count

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        new = []
        for node, probs in leaves.items():
            tree.draft_probs[node] = probs
            through = self._count if node == ROOT else tree.multiplicity[node]
            drawn = Counter(draw(probs, generator) for _ in range(through))
            new += [tree.add(token, node, rank=rank, multiplicity=m) for rank, (token, m) in enumerate(drawn.items())]
        return new
