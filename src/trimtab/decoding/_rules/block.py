"""Block verification: a chain is accepted as a whole, so that a poor token may be made up for by later ones.

Paper: Sun et al., "Block Verification Accelerates Speculative Decoding", ICLR 2025, arXiv:2403.10444.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._rules.base import AcceptanceRule, Walk, after
from trimtab.decoding._sampling import draw, normalised, uniform
from trimtab.decoding._tree import ROOT, DraftTree, Law


class BlockRule(AcceptanceRule):
    """Keep the longest prefix of the chain that passes; on average never shorter than token by token.

    With draft p and target q, a prefix y_1 .. y_i has the weight P_i = min(1, P_(i-1) q(y_i) / p(y_i)), P_0 = 1. It
    passes with probability A / (A + 1 - P_i), where A = sum_x (P_i q(x) - p(x))+ of the next token; the whole chain
    with probability P. All prefixes are tried, whether or not shorter ones passed. The token after the longest that
    passed comes from (P_i q - p)+, after the whole chain from q.
    """

    laws: ClassVar[frozenset[Law]] = frozenset({"iid"})
    chains: ClassVar[bool] = True

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        kept, rest = 0, after(target_probs, ROOT)
        weight = 1.0
        for length in range(len(tree) + 1):
            node = length - 1  # of a chain: node i follows node i - 1, and the first follows ROOT
            target = after(target_probs, node)
            if length == len(tree):
                left, passes = target, weight
            else:
                left = (weight * target - tree.draft_probs[node]).clamp_min(0)
                mass = float(left.sum(dtype=torch.float64))
                passes = mass / (mass + 1 - weight) if mass > 0 else 0.0
            if length == 0 or uniform(generator) < passes:
                kept, rest = length, normalised(left, target)
            if length < len(tree):
                token = tree.tokens[length]
                weight = min(1.0, weight * float(target[token]) / float(tree.draft_probs[node][token]))
        return Walk(tuple(range(kept)), draw(rest, generator))
