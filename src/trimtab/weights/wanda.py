"""Remove, in every row, the weights whose magnitude times the norm of their input is smallest.

Paper: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv:2306.11695.

    score_ij = |W_ij| |X_j|_2        |X_j|_2: the norm of input j over the calibration text

Every row loses its floor(in * sparsity) smallest entries (equal ones: the first); with n:m sparsity every m columns of
a row lose n. What is kept is exactly what it was, unless `repair` asks for more. The norm is taken as the root of the
mean square: a factor that is the same for all entries changes no choice.

Departures: norms come from the original model, because pruned inputs choose worse (docs/journal.md); with mode
"sequential" they are those of the model pruned so far, as in the authors' code. `within` and `repair` go beyond it.

Cost: one pass over the calibration text and one sort of each row. When it fails: above 60 %, where what is removed has
to be made up for; `sparsegpt` does, and so does `repair`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from trimtab.weights._pruner import PruneMethod, Site

if TYPE_CHECKING:
    from trimtab.models.statistics import Need

__all__ = ["Wanda"]


@dataclass(frozen=True, kw_only=True)
class Wanda(PruneMethod):
    """Options of PruneMethod; rows are compared within themselves by default."""

    @property
    def score_needs(self) -> frozenset[Need]:
        return frozenset({"second_moment"})

    def score(self, site: Site) -> Tensor:
        return site.weight.abs() * site.input_norms
