"""Trees whose siblings are drawn without replacement, by perturbing log-probabilities with Gumbel noise.

Papers: Jeon et al., "Recursive Speculative Decoding", 2024, arXiv:2402.14160; Kool et al., "Stochastic Beams and Where
to Find Them", ICML 2019, arXiv:1903.06059.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.decoding._distribution import Distribution
from trimtab.decoding._proposers.base import ModelProposer
from trimtab.decoding._reader import Reader
from trimtab.decoding._tree import DraftTree, Law


class ConstantBranching(ModelProposer):
    """RSD-C: every node of level l has branching[l] children, or all tokens that are possible if there are fewer."""

    law: ClassVar[Law] = "gumbel_swor"
    branches: ClassVar[bool] = True

    def __init__(
        self, new_reader: Callable[[int], Reader], distribution: Distribution, branching: Sequence[int]
    ) -> None:
        super().__init__(new_reader, distribution, len(branching))
        self._branching = tuple(branching)

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        new = []
        for node, probs in leaves.items():
            tree.draft_probs[node] = probs
            log_probs = probs.cpu().double().log()
            tokens, _ = largest(log_probs + gumbel(log_probs.shape, generator), self._branching[level])
            new += [tree.add(token, node, rank=rank) for rank, token in enumerate(tokens)]
        return new


class StochasticBeam(ModelProposer):
    """RSD-S: of all sequences of a level the `width` with the largest perturbed log-probabilities.

    Perturbations of a node's children are drawn under the condition that the largest equals the node's own: the
    sequences of a level are then draws without replacement from all sequences of that length. A node whose children
    are all dropped stays in the tree as a leaf.
    """

    law: ClassVar[Law] = "gumbel_swor"
    branches: ClassVar[bool] = True

    def __init__(self, new_reader: Callable[[int], Reader], distribution: Distribution, depth: int, width: int) -> None:
        super().__init__(new_reader, distribution, depth)
        self._width = width

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        nodes, probs = list(leaves), torch.stack(list(leaves.values()))
        before = torch.tensor([_log_probability(tree, node) for node in nodes], dtype=torch.float64)
        own = torch.tensor([tree.values.get(node, 0.0) for node in nodes], dtype=torch.float64)
        log_probs = before[:, None] + probs.cpu().double().log()
        perturbed = conditioned(log_probs + gumbel(log_probs.shape, generator), own)
        places, values = largest(perturbed.flatten(), self._width)
        new, siblings = [], dict.fromkeys(nodes, 0)
        for place, value in zip(places, values, strict=True):
            row, token = divmod(place, perturbed.shape[1])
            parent = nodes[row]
            tree.draft_probs[parent] = probs[row]
            child = tree.add(token, parent, rank=siblings[parent])
            siblings[parent] += 1
            tree.values[child] = value
            new.append(child)
        return new


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float64."""
    return -torch.empty(tuple(shape), dtype=torch.float64).exponential_(generator=generator).log()


def conditioned(perturbed: Tensor, largest: Tensor) -> Tensor:
    """Perturbed log-probabilities [n, V], given that the largest of row i is largest[i] (Kool et al., appendix B.3).

    With G the wanted maximum and Z the row's own, x becomes -log(exp(-G) - exp(-Z) + exp(-x)), in the form that does
    not overflow.
    """
    found = perturbed.max(dim=-1, keepdim=True).values
    wanted = largest[:, None]
    v = wanted - perturbed + torch.log1p(-torch.exp(perturbed - found))
    return wanted - v.clamp_min(0) - torch.log1p(torch.exp(-v.abs()))


def largest(values: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Places and values of so many largest ones, in their order; -inf is never among them."""
    found = values.topk(min(count, values.numel()))
    possible = int((found.values > -torch.inf).sum())
    return found.indices[:possible].tolist(), found.values[:possible].tolist()


def _log_probability(tree: DraftTree, node: int) -> float:
    """Of the tokens from the text on to this node, under the draft."""
    probs = [float(tree.draft_probs[tree.parents[n]][tree.tokens[n]]) for n in tree.path(node)]
    return float(torch.tensor(probs, dtype=torch.float64).log().sum())
