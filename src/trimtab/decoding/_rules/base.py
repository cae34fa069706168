"""The contract of acceptance rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CompositionError
from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._tree import DraftTree, Law


@dataclass(frozen=True, slots=True)
class Walk:
    """Where a rule went: nodes from the text on, and the token that follows the last of them."""

    path: tuple[int, ...]
    next_token: int


class AcceptanceRule(ABC):
    """Chooses a branch of a draft and the token after it.

    laws     of drafts for which it is exact: then branch and token are distributed as if the target had drawn them
    chains   only for trees without branches
    lossy    it is exact for none, and says so
    """

    laws: ClassVar[frozenset[Law]]
    chains: ClassVar[bool] = False
    lossy: ClassVar[bool] = False

    @abstractmethod
    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        """target_probs [N + 1, V]: the target's distribution after the text, then after each node."""

    def check(self, proposer: Proposer) -> None:
        """Raise CompositionError if drafts of this proposer would bias what this rule decodes."""
        own, other = type(self).__name__, type(proposer).__name__
        if proposer.law not in self.laws:
            raise CompositionError(
                f"the acceptance rule {own} is exact for drafts of the law {' or '.join(sorted(self.laws))}, but "
                f"{other} drafts by the law {proposer.law}: what is decoded would not follow the model's distribution. "
                "Choose another rule."
            )
        if self.chains and proposer.branches:
            raise CompositionError(f"the acceptance rule {own} walks along chains, but {other} drafts trees.")


def after(target_probs: Tensor, node: int) -> Tensor:
    """The target's distribution [V] after a node, or after the text for ROOT."""
    return target_probs[node + 1]


def only_child(tree: DraftTree, node: int) -> int | None:
    """The child of a node in a chain; None at its end."""
    children: Sequence[int] = tree.children(node)
    assert len(children) <= 1, "a chain has no branches"
    return children[0] if children else None
