"""Claims of recursive speculative decoding with constant branching."""

from __future__ import annotations

from trimtab.claims._trees import DEPTH, WIDTH, claims_of_tree
from trimtab.decoding import RsdC
from trimtab.evaluation.acceptance import DRAFT

__all__ = ["CLAIMS"]

CLAIMS = claims_of_tree(
    RsdC(draft=DRAFT, branching=(2, 2)),
    RsdC(draft=DRAFT, branching=(WIDTH, *[1] * (DEPTH - 1))),
    "a tree of constant branching",
)
