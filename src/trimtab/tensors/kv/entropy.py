"""Why channels are coupled: together they hold less information than one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def joint_and_marginal_entropy(x: Tensor, coupled: int, *, bins: int = 16) -> tuple[Tensor, Tensor]:
    """x [T, C] -> for each group of `coupled` neighbouring channels, in bits: H(X1 ... Xc), and H(X1) + ... + H(Xc).

    Channels are cut into `bins` of equal width between their least and largest value. Counts are taken as
    probabilities, so with T far below bins^coupled the joint entropy is too small: at most log2 T.
    Source: Coupled Quantization (arXiv:2405.03917), figure 1.
    """
    low, high = x.amin(0), x.amax(0)
    width = ((high - low) / bins).clamp(min=torch.finfo(torch.float32).tiny)
    cut = ((x - low) / width).long().clamp(max=bins - 1)
    marginal = torch.stack([_entropy(column) for column in cut.T]).view(-1, coupled).sum(1)
    digits = bins ** torch.arange(coupled, device=x.device)
    joint = torch.stack([_entropy(column) for column in (cut.view(len(x), -1, coupled) * digits).sum(2).T])
    return joint, marginal


def _entropy(symbols: Tensor) -> Tensor:
    _, counts = torch.unique(symbols, return_counts=True)
    p = counts.double() / len(symbols)
    nats: Tensor = torch.special.entr(p).sum()
    return nats / math.log(2)
