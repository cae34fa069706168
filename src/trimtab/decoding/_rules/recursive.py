"""Recursive rejection sampling: siblings drawn without replacement, each tested against what those before it left.

Paper: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement", 2024,
arXiv:2402.14160.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._rules.base import AcceptanceRule, Walk, after
from trimtab.decoding._sampling import draw, normalised, uniform
from trimtab.decoding._tree import ROOT, DraftTree, Law


class RecursiveRule(AcceptanceRule):
    """Go down the first child that passes, in the order of their draws.

    The k-th child is a draw from p_k, the draft without its earlier siblings. It is accepted with probability
    min(1, q_k / p_k); if not, q_(k+1) is what is left of q_k, (q_k - p_k)+, and p_(k+1) is p_k without this child. A
    node at which no child passes ends the walk with a draw from what is left.
    """

    laws: ClassVar[frozenset[Law]] = frozenset({"gumbel_swor"})

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while children := tree.children(node):
            target, draft = after(target_probs, node), tree.draft_probs[node]
            for child in children:
                token = tree.tokens[child]
                if uniform(generator) * float(draft[token]) < float(target[token]):
                    break
                target, draft = left_over(target, draft, token)
            else:
                return Walk(tuple(path), draw(target, generator))
            path.append(child)
            node = child
        return Walk(tuple(path), draw(after(target_probs, node), generator))


def left_over(target: Tensor, draft: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Target and draft [V] for the next sibling, once this token has been refused.

    A draft without any other token keeps no mass: there is no further sibling, and it is not read again.
    """
    others = draft.clone()
    others[token] = 0
    return normalised(target - draft, target), normalised(others, others)
