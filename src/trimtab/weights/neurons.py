"""Remove neurons by a plain score: the baseline beside which structured methods have to show what they add.

Paper: none of its own; the baseline of Sengupta et al., "You Only Prune Once", ICLR 2025, arXiv:2501.15296, and of most
others that remove neurons.

    random        a number drawn for each neuron
    row_norm      |W_i|, the row of the first matrix (gate; up where there is no gate)
    wanda         sum of |W_ij| |X_j| over the entries of the neuron in gate, up and down, |X_j| the norm of their input
    energy        E[h_i^2], h what down reads
    energy_down   E[h_i^2] |down_i|^2: what the neuron adds to the output of the MLP on its own
    ridge         ridge leverage in E[h h^T]: what of h_i the other neurons do not predict (as in `modegpt`)

The same share goes from every block. `repair=least_squares` makes up for what was removed, for any of them.

Cost: none for random and row_norm; one pass over calibration text for the others and for the repair. When it fails:
blocks differ in what they can lose, and this takes the same from all; `modegpt` does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.weights._pruning.nystrom import ridge_scores
from trimtab.weights._pruning.policy import first_matrix
from trimtab.weights._pruning.units import neurons
from trimtab.weights._slicer import NeuronMethod

if TYPE_CHECKING:
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView
    from trimtab.weights.base import WeightMethod

__all__ = ["Neurons"]

RIDGE = 1e-2

Score = Literal["random", "row_norm", "wanda", "energy", "energy_down", "ridge"]


@dataclass(frozen=True, kw_only=True)
class Neurons(NeuronMethod):
    """Options of NeuronMethod, and:

    score   by which neurons are kept: random, row_norm, wanda, energy, energy_down, ridge
    """

    score: Score = "row_norm"

    @property
    def score_needs(self) -> frozenset[Need]:
        if self.score in ("random", "row_norm"):
            return frozenset()
        return frozenset({"gram"} if self.score == "ridge" else {"second_moment"})

    def prepare(self, planning: Planning) -> WeightMethod:
        return _Prepared(**vars(super().prepare(planning)), seed=planning.seed)

    def neuron_scores(self, block: BlockView, stats: Mapping[str, Stats]) -> Tensor:
        linears = block.mlp.linears
        if self.score == "row_norm":
            norms: Tensor = torch.linalg.vector_norm(first_matrix(linears).float(), dim=1)
            return norms.cpu()
        if self.score == "wanda":
            entries = {x.name: x.weight.float().abs() * _second_moment(stats, x.site).sqrt() for x in linears}
            return neurons(block).reduce({name: scores.cpu() for name, scores in entries.items()})
        down = next(x for x in linears if x.role == "down")
        if self.score == "ridge":
            gram = stats[down.site].gram
            assert gram is not None
            return ridge_scores(gram.to(down.weight.device), RIDGE).cpu()
        energy = _second_moment(stats, down.site)
        if self.score == "energy_down":
            energy = energy * down.weight.float().square().sum(dim=0)
        return energy.cpu()


@dataclass(frozen=True, kw_only=True)
class _Prepared(Neurons):
    """With the seed of the run."""

    seed: int

    def neuron_scores(self, block: BlockView, stats: Mapping[str, Stats]) -> Tensor:
        if self.score != "random":
            return super().neuron_scores(block, stats)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{block.name}".encode()))
        return torch.rand(neurons(block).count, generator=generator)


def _second_moment(stats: Mapping[str, Stats], site: str) -> Tensor:
    found = stats[site].second_moment
    assert found is not None
    return found
