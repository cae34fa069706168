"""Token-level speculative sampling, and its greedy case.

Papers: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
arXiv:2211.17192; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023,
arXiv:2302.01318.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._rules.base import AcceptanceRule, Walk, after, only_child
from trimtab.decoding._sampling import draw, normalised, uniform
from trimtab.decoding._tree import ROOT, DraftTree, Law


class TokenRule(AcceptanceRule):
    """Accept a drafted token y with probability min(1, q(y) / p(y)), target q over draft p; else draw from (q - p)+."""

    laws: ClassVar[frozenset[Law]] = frozenset({"iid"})
    chains: ClassVar[bool] = True

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while (child := only_child(tree, node)) is not None:
            target, draft = after(target_probs, node), tree.draft_probs[node]
            token = tree.tokens[child]
            if uniform(generator) * float(draft[token]) >= float(target[token]):
                return Walk(tuple(path), draw(normalised(target - draft, target), generator))
            path.append(child)
            node = child
        return Walk(tuple(path), draw(after(target_probs, node), generator))


class SampleRule(AcceptanceRule):
    """Draw from the target; where the token was drafted, go on behind it. For drafts that were named and not drawn.

    The same as token-level speculative sampling with a draft that puts all its probability on one token, and with
    several children as likely to accept as any exact rule can be.
    """

    laws: ClassVar[frozenset[Law]] = frozenset({"deterministic"})

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while True:
            token = draw(after(target_probs, node), generator)
            child = next((c for c in tree.children(node) if tree.tokens[c] == token), None)
            if child is None:
                return Walk(tuple(path), token)
            path.append(child)
            node = child


class GreedyRule(AcceptanceRule):
    """Follow the target's likeliest token as long as it was drafted. Any draft will do: nothing is left to chance.

    For targets whose distribution is a single token (temperature 0); of several likeliest ones it takes the lowest id.
    """

    laws: ClassVar[frozenset[Law]] = frozenset({"iid", "gumbel_swor", "deterministic"})

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        path: list[int] = []
        node = ROOT
        while True:
            token = int(after(target_probs, node).argmax())
            child = next((c for c in tree.children(node) if tree.tokens[c] == token), None)
            if child is None:
                return Walk(tuple(path), token)
            path.append(child)
            node = child
