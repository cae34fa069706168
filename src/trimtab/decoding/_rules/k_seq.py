"""k-SEQ: several independent drafts of one token, coupled with the target so that one of them is often the answer.

Paper: Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", NeurIPS 2023, arXiv:2310.15141.

With draft p, target q and k independent drafts of p, a division factor rho in [1, k] defines

    beta = sum_x min(p(x), q(x) / rho)      accepted = 1 - (1 - beta)^k

Drafts are tried one after the other and accepted with probability min(1, q / (rho p)); if none is, the token comes from
what accepted ones leave of q. That is a distribution as long as accepted <= rho beta. rho*, where both sides are
equal, accepts the most, at least 1 - 1/e of what any coupling can, and leaves (q - rho* p)+ to draw from.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.decoding._rules.base import AcceptanceRule, Walk, after
from trimtab.decoding._sampling import draw, normalised, uniform
from trimtab.decoding._tree import ROOT, DraftTree, Law

_EPSILON = 1e-12
"""Of rho*, and of what rounding may make accepted and rho beta differ by."""


@dataclass(frozen=True, slots=True)
class Division:
    """rho* of a draft and a target for k drafts; `accepted`: probability that one of them is accepted."""

    factor: float
    accepted: float


def division(draft: Tensor, target: Tensor, drafts: int) -> Division:
    """rho* of distributions [V] and so many independent drafts, by bisection in float64.

    Of tokens in the order of q / p, beta(rho) is the p of those from rho on plus the q of the others divided by rho, so
    a step costs a look-up. It keeps the side on which what is left of the target is a distribution.
    """
    both = (draft > 0) & (target > 0)
    p, q = draft[both].cpu().double().numpy(), target[both].cpu().double().numpy()
    ratios = q / p
    between = (ratios >= 1) & (ratios < drafts)
    order = np.argsort(ratios[between])
    points: list[float] = ratios[between][order].tolist()
    p_from: list[float] = (p[ratios >= drafts].sum() + np.append(p[between][order][::-1].cumsum()[::-1], 0)).tolist()
    q_below: list[float] = (q[ratios < 1].sum() + np.append(0, q[between][order].cumsum())).tolist()

    def beta(rho: float) -> float:
        place = bisect_left(points, rho)
        return min(1.0, p_from[place] + q_below[place] / rho)

    def excess(rho: float) -> float:
        return 1 - (1 - beta(rho)) ** drafts - rho * beta(rho)

    low, high = 1.0, float(drafts)
    if excess(low) <= _EPSILON:
        high = low
    while high - low > _EPSILON:
        middle = (low + high) / 2
        if excess(middle) <= 0:
            high = middle
        else:
            low = middle
    return Division(high, min(1.0, high * beta(high)))


class KSeqRule(AcceptanceRule):
    """Walk down a trie of independent sequences: k-SEQ at every node, with as many drafts as came that far."""

    laws: ClassVar[frozenset[Law]] = frozenset({"iid"})

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while children := tree.children(node):
            target, draft = after(target_probs, node), tree.draft_probs[node]
            drafts = in_random_order([c for c in children for _ in range(tree.multiplicity[c])], generator)
            factor = division(draft, target, len(drafts)).factor
            limits = factor * draft
            for child in drafts:
                token = tree.tokens[child]
                if uniform(generator) * float(limits[token]) < float(target[token]):
                    break
            else:
                return Walk(tuple(path), draw(normalised(target - limits, target), generator))
            path.append(child)
            node = child
        return Walk(tuple(path), draw(after(target_probs, node), generator))


def in_random_order(drafts: list[int], generator: torch.Generator) -> list[int]:
    """Independent draws come in any order; tried copy after copy, a token drawn twice would win too often."""
    if len(drafts) == 1:
        return drafts
    return [drafts[i] for i in torch.randperm(len(drafts), generator=generator).tolist()]
