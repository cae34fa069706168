"""One token after the other, each drawn from the draft's distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._distribution import Distribution
from trimtab.decoding._proposers.base import ModelProposer
from trimtab.decoding._reader import Reader
from trimtab.decoding._sampling import draw
from trimtab.decoding._tree import DraftTree, Law


class Chain(ModelProposer):
    """`depth` tokens in a row (Leviathan et al. 2023, algorithm 1).

    stop_below   no further token once the draft's likeliest one has less probability than this; 0: never
    """

    law: ClassVar[Law] = "iid"

    def __init__(
        self, new_reader: Callable[[int], Reader], distribution: Distribution, depth: int, stop_below: float = 0.0
    ) -> None:
        super().__init__(new_reader, distribution, depth)
        self._stop_below = stop_below

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        ((node, probs),) = leaves.items()
        if float(probs.max()) < self._stop_below:
            return []
        tree.draft_probs[node] = probs
        return [tree.add(draw(probs, generator), node)]
