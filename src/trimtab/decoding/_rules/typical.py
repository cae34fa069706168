"""Typical acceptance: a drafted token that the target finds plausible is taken. Lossy.

Paper: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", ICML 2024,
arXiv:2401.10774.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._rules.base import AcceptanceRule, Walk, after, only_child
from trimtab.decoding._sampling import draw
from trimtab.decoding._tree import ROOT, DraftTree, Law


class TypicalRule(AcceptanceRule):
    """Accept a drafted token y if q(y) > min(epsilon, delta exp(-H(q))), H the target's entropy in nats.

    What is decoded follows neither target nor draft: unlikely tokens become rarer than the target has them. The token
    after the last accepted one is drawn from the target.
    """

    laws: ClassVar[frozenset[Law]] = frozenset({"iid", "gumbel_swor", "deterministic"})
    chains: ClassVar[bool] = True
    lossy: ClassVar[bool] = True

    def __init__(self, epsilon: float, delta: float) -> None:
        self._epsilon = epsilon
        self._delta = delta

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while (child := only_child(tree, node)) is not None:
            target = after(target_probs, node)
            entropy = float(torch.special.entr(target).sum())
            if float(target[tree.tokens[child]]) <= min(self._epsilon, self._delta * math.exp(-entropy)):
                break
            path.append(child)
            node = child
        return Walk(tuple(path), draw(after(target_probs, node), generator))
