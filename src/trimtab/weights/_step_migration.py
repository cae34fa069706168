"""What MergeQuant does to one site, as functions of tensors: steps, copies of channels, removal, low-rank repair.

Symbols: x [tokens, in] the inputs, W [out, in] the weights that read them, stacked; s [in] the steps; the integers
X = clip(round(x / s)); W' = W diag(s), so that X W'^T ~ x W^T.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.tensors.low_rank import svd
from trimtab.tensors.metric import Metric

SMALLEST_STEP = 1e-5
"""Of the median step: a channel that is all but dead must not make the norm's gain overflow."""


@dataclass(frozen=True, slots=True)
class Copies:
    """How often each channel stands in the wide input: int64 [in], 0 if it was removed."""

    count: Tensor

    @property
    def index(self) -> Tensor:
        """int32 [width]: the channel at each place."""
        channels = torch.arange(len(self.count), device=self.count.device)
        return channels.repeat_interleave(self.count).int()

    def widen(self, weight: Tensor) -> Tensor:
        """Columns [out, in] -> [out, width]: each copy gets an equal part, so the products of all add up to one."""
        index = self.index.long()
        return weight[:, index] / self.count[index]

    def fold(self, weight: Tensor) -> Tensor:
        """[out, width] -> [out, in]: what the copies of a channel do together."""
        return weight.new_zeros(len(weight), len(self.count)).index_add_(1, self.index.long(), weight)


def steps_for(largest: Tensor, levels: int) -> Tensor:
    """s [in] for channels of at most `largest` [in] in magnitude and integers -levels .. levels."""
    steps = largest.float() / levels
    floor = SMALLEST_STEP * float(steps.median())
    return steps.clamp(min=floor) if floor > 0 else torch.where(steps > 0, steps, 1.0)


def integers(x: Tensor, steps: Tensor, levels: int) -> Tensor:
    """X, whole numbers in float32."""
    return (x / steps).round().clamp(-levels, levels)


def saturation(x: Tensor, steps: Tensor, levels: int) -> float:
    """Share of inputs that the clip changes by more than rounding does."""
    return float(((x / steps).abs() > levels + 0.5).float().mean())


def split(strength: Tensor, threshold: float) -> Copies:
    """ceil(strength / threshold) copies of the channels beyond the threshold, one of the others."""
    return Copies((strength / threshold).ceil().clamp(min=1).long())


def threshold_of(strength: Tensor, alpha: float) -> float:
    """mean + alpha * standard deviation over the channels."""
    return float(strength.mean() + alpha * strength.std(correction=0))


def fill(copies: Copies, strength: Tensor, width: int) -> Copies:
    """More copies, one by one of the channel that is then strongest, up to `width` in all."""
    count = copies.count.clone()
    for _ in range(width - int(count.sum())):
        count[(strength / count).argmax()] += 1
    return Copies(count)


def remove(weight: Tensor, gram: Tensor, copies: Copies, number: int, damp: float) -> tuple[Tensor, Copies]:
    """Remove `number` channels, the least important one at a time, and let the others stand in for each (OBS).

    weight    W' [out, in]
    gram      E[X X^T], [in, in], damped here by `damp` of its mean diagonal

    The importance of channel j is `sum_o W'_oj^2 / [H^-1]_jj`, and its removal `W' -= W'_j [H^-1]_j / [H^-1]_jj`.
    Channels with several copies stay. Source: Hassibi and Stork, "Second order derivatives for network pruning:
    Optimal Brain Surgeon", NIPS 1992.
    """
    weight, count = weight.double(), copies.count.clone()
    inverse = torch.linalg.inv(_damped(gram, damp))
    removable = count == 1
    for _ in range(min(number, int(removable.sum()))):
        pivots = torch.where(removable, inverse.diagonal(), 1.0)
        importance = torch.where(removable, weight.square().sum(dim=0) / pivots, torch.inf)
        j = int(importance.argmin())
        row = inverse[j] / inverse[j, j]
        weight = weight - weight[:, j : j + 1] * row
        inverse = inverse - torch.outer(inverse[:, j], row)
        weight[:, j] = 0
        removable[j], count[j] = False, 0
    return weight.float(), Copies(count)


def compensation(weight: Tensor, gram: Tensor, residual: Tensor, rank: int, damp: float) -> Tensor:
    """The change [out, in] of at most this rank to W' that brings X W'^T closest to the outputs wanted.

    gram        E[X X^T], [in, in], damped here by `damp` of its mean diagonal: a ridge
    residual    E[r X^T], [out, in], of r = x W^T - X W'^T

    Reduced-rank regression in closed form: the least-squares change `residual H^-1`, cut to its leading components in
    the norm tr(D H D^T).
    """
    damped = _damped(gram, damp)
    full = torch.linalg.solve(damped, residual.double().T).T
    rank = min(rank, *weight.shape)
    return svd(full, rank, Metric.gram(damped, name="the integers"), dtype=torch.float32).dequantize()


def _damped(gram: Tensor, damp: float) -> Tensor:
    h = gram.double()
    mean = float(h.diagonal().mean())
    return h + (damp * mean if mean else 1.0) * torch.eye(len(h)).to(h)


def clusters(strength: Tensor) -> list[Tensor]:
    """Channels by decreasing strength in groups that double in size: 1/64 of all, 1/64, 1/32, ... 1/2."""
    order = strength.argsort(descending=True, stable=True)
    bounds = sorted({0, len(order), *(max(1, len(order) >> shift) for shift in range(1, 7))})
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def descend(
    objective: Callable[[Tensor], float], groups: list[Tensor], ratios: list[float], size: int, patience: int
) -> Tensor:
    """One ratio for each group of channels, each chosen in turn with the others as they are: ratios [size].

    `ratios` begin at 1 and fall; once `patience` of them in a row were no better, the next group is taken.
    """
    best = torch.ones(size)
    least = objective(best)
    for group in groups:
        waited = 0
        for ratio in ratios[1:]:
            tried = best.clone()
            tried[group.cpu()] = ratio
            if (found := objective(tried)) < least:
                best, least, waited = tried, found, 0
            elif (waited := waited + 1) == patience:
                break
    return best
