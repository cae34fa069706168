"""Claims of recursive speculative decoding with stochastic beam search."""

from __future__ import annotations

from trimtab.claims._trees import DEPTH, WIDTH, claims_of_tree
from trimtab.decoding import RsdS
from trimtab.evaluation.acceptance import DRAFT

__all__ = ["CLAIMS"]

CLAIMS = claims_of_tree(
    RsdS(draft=DRAFT, width=3, depth=2), RsdS(draft=DRAFT, width=WIDTH, depth=DEPTH), "a stochastic beam"
)
