"""Which neurons of an MLP carry the rest: scores from E[h h^T], h what `down` reads (MoDeGPT, arXiv:2408.09632)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.weights._pruning.repair import damped_factor


def ridge_scores(gram: Tensor, ridge: float) -> Tensor:
    """1 / [(C + lambda I)^-1]_ii, float64 [n]: the energy of neuron i that the others cannot predict.

    gram     C [n, n], symmetric positive semidefinite, any positive scaling
    ridge    lambda as a share of the mean diagonal; ten times as much, up to six times over, where C + lambda I is
             singular in float64

    In the order of the ridge leverage scores [C (C + lambda I)^-1]_ii = 1 - lambda [(C + lambda I)^-1]_ii, which all
    round to 1 where lambda is small. A large lambda ranks by C_ii. Raises NumericsError for a matrix that is far from
    positive semidefinite.
    """
    wide = gram.double()
    mean = float(wide.diagonal().mean())
    if mean <= 0:  # no token reaches any neuron
        return torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    lower = damped_factor(wide[None], ridge, mean)[0]
    return 1 / torch.cholesky_inverse(lower).diagonal()


def energy_scores(gram: Tensor, down: Tensor | None = None) -> Tensor:
    """C_ii, float64 [n]; with the weight of `down` [out, n], C_ii |down_i|^2: what neuron i adds to the output."""
    energy = gram.double().diagonal().clamp(min=0)
    return energy if down is None else energy * down.double().square().sum(dim=0)
