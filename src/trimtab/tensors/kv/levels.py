"""Tables of levels learnt from normalised keys or values: KVQuant's nuqX datatype and Q-Norm (arXiv:2401.18079)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.kv.grid import nearest_level

_WEIGHT_QUANTILE = 0.999
_TOLERANCE = 1e-6


def fisher_weights(squared_gradients: Tensor, scale: Tensor | None) -> Tensor:
    """Weights of normalised entries x' = (x - z) / s: squared gradients of the loss at x, times s^2 (equation 7).

    scale   s, broadcast against the gradients. None: the gradients alone, which is what the official code passes; an
            error in x' is multiplied by s in x, so the factor belongs there, and the paper's ablation says it helps

    Weights above the 99.9th percentile become that percentile, or a few entries take levels for themselves.
    """
    weights = squared_gradients.float()
    return clipped(weights if scale is None else weights * scale.float().square())


def clipped(weights: Tensor) -> Tensor:
    """Weights, those above the 99.9th percentile lowered to it."""
    rank = max(1, round(weights.numel() * _WEIGHT_QUANTILE))
    return weights.clamp(max=weights.flatten().kthvalue(rank).values)


def fit_levels(values: Tensor, bits: int, weights: Tensor | None = None, *, iterations: int = 50) -> Tensor:
    """Weighted k-means in one dimension: ascending float32 [2^bits] levels of least sum w (x' - Q(x'))^2.

    values      inliers, normalised; any shape
    weights     not negative, in the shape of values; None: all equal. Only their ratios matter
    iterations  at most; fewer when the error falls by less than a millionth

    Lloyd's iterations on sorted values, each a binary search for 2^bits - 1 midpoints, from levels halfway between
    uniform and quantiles; nothing is random. (The official code starts k-means++ with seed 0.) A level without weight
    moves to the value of largest weighted error. Needs about 40 bytes for each value.

    Raises ConfigError for fewer values than levels, NumericsError for NaN, infinity or negative weights.
    """
    count = 1 << bits
    x, order = values.flatten().double().sort()
    if len(x) < count:
        raise ConfigError(f"{len(x)} values for {count} levels; calibrate with more tokens.")
    w = torch.ones_like(x) if weights is None else weights.flatten().double()[order]
    if not bool(torch.isfinite(x).all() & torch.isfinite(w).all() & (w >= 0).all()) or float(w.sum()) == 0:
        raise NumericsError("levels are fitted to finite values with finite weights, not negative and not all zero.")
    mass, moment, square = (_running(term) for term in (w, w * x, w * x * x))
    share = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    quantiles = x[torch.searchsorted(mass[1:], share * mass[-1]).clamp(max=len(x) - 1)]
    levels = (quantiles + x[0] + (x[-1] - x[0]) * share) / 2
    best = torch.inf
    for _ in range(iterations):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2, right=True)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        masses, moments = mass[ends].diff(), moment[ends].diff()
        empty = masses <= 0
        levels = torch.where(empty, levels, moments / masses.clamp(min=torch.finfo(torch.float64).tiny))
        if bool(empty.any()):
            levels = _reseeded(levels, empty, x, w)
            continue
        error = float((square[ends].diff() - moments * levels).sum())
        if error >= best * (1 - _TOLERANCE):
            break
        best = error
    return levels.float()


def q_norm(levels: Tensor, values: Tensor) -> Tensor:
    """The table to decode with: mean and standard deviation of decoded values become those of `values`.

    levels [2^b], values: normalised inliers. level' = (level - m2) s1 / s2 + m1 with m1, s1 of the values and m2, s2 of
    their nearest levels. The squared error rises slightly; the paper needs it at 2 bits.
    """
    quantized = levels.double()[nearest_level(values.float(), levels).int()]
    wanted = values.double()
    spread = wanted.std() / quantized.std()
    return ((levels.double() - quantized.mean()) * spread + wanted.mean()).float()


def _running(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(0), (1, 0))


def _reseeded(levels: Tensor, empty: Tensor, x: Tensor, w: Tensor) -> Tensor:
    held = levels[~empty]
    error = w * (x - held[nearest_level(x, held).int()]).square()
    return torch.cat([held, x[error.topk(int(empty.sum())).indices]]).sort().values
