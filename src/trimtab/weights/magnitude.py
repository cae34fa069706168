"""Remove the weights of smallest magnitude; needs no data.

Paper: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv:1506.02626.

The score of an entry is |W_ij|. By default all entries of a matrix are compared, and everything up to and with the one
of rank floor(out * in * sparsity) goes, which is the rule of the code that the papers on one-shot pruning compare with.
With n:m sparsity the n smallest of every m columns go. What is kept is exactly what it was.

Departures: the paper prunes and trains in turns; as in later papers, this is one shot without training. Of entries that
are equal at the threshold only as many go as the count asks for, the first ones in the matrix; the code removes all.

Cost: one sort of each matrix. When it fails: it does not see which inputs are loud. Where a few channels carry most of
the activation, `wanda` is better at the same bytes, and from 50 % on much better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.weights._pruner import PruneMethod, Site

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(PruneMethod):
    """Options of PruneMethod; a whole matrix is compared by default."""

    within: Literal["row", "matrix", "model"] = "matrix"

    def score(self, site: Site) -> Tensor:
        return site.weight.abs()
