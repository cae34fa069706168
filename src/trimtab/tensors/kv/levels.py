"""Tables of levels learnt from normalised keys or values: KVQuant's nuqX datatype and Q-Norm (arXiv:2401.18079)."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.kv.grid import nearest_level

_WEIGHT_QUANTILE = 0.999
_TOLERANCE = 1e-6
_PLACES = 1024


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
    iterations  of Lloyd's algorithm, at most; fewer when the error falls by less than a millionth

    The official code starts k-means++ with seed 0, and may end with fewer levels. Here Lloyd's algorithm starts from
    the best cut of the sorted values into 2^bits runs among 1,024 places (dynamic programming), so nothing is random
    and no level is lost; up to as many values, the result is optimal. Needs about 50 bytes for each value. With fewer
    distinct values than levels, the last level is repeated.

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
    ends = _best_runs(mass, moment, square, _places(x, mass), count)
    levels = x[ends[:-1]]
    best = torch.inf
    for _ in range(iterations):
        masses, moments = mass[ends].diff(), moment[ends].diff()
        levels = torch.where(masses > 0, moments / masses.clamp(min=torch.finfo(torch.float64).tiny), levels)
        error = float((square[ends].diff() - moments * levels).sum())
        if error >= best * (1 - _TOLERANCE):
            break
        best = error
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2, right=True)
        ends = torch.cat([ends[:1], inner, ends[-1:]])
    return torch.cat([levels, levels[-1:].expand(count - len(levels))]).float()


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
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)])


def _places(x: Tensor, mass: Tensor) -> Tensor:
    """Where runs of the sorted x may begin or end: between any two distinct values, or about _PLACES of them.

    Half of them are evenly spaced in value, half in weight.
    """
    changes = torch.searchsorted(x, torch.unique_consecutive(x))
    if len(changes) > _PLACES:
        share = torch.linspace(0, 1, _PLACES // 2, dtype=torch.float64, device=x.device)
        by_value = torch.searchsorted(x, x[0] + (x[-1] - x[0]) * share)
        by_mass = torch.searchsorted(mass[:-1].contiguous(), mass[-1] * share)
        wanted = torch.cat([by_value, by_mass])
        changes = changes[torch.searchsorted(changes, wanted).clamp(max=len(changes) - 1)]
    places: Tensor = torch.unique(torch.cat([changes, changes.new_tensor([0, len(x)])]))
    return places


def _best_runs(mass: Tensor, moment: Tensor, square: Tensor, places: Tensor, count: int) -> Tensor:
    """Ends of the `count` runs between these places, or of all there are, of least squared error: [count + 1]."""
    masses, moments, squares = (total[places][None, :] - total[places][:, None] for total in (mass, moment, square))
    cost = (squares - moments.square() / masses.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    cost = cost.masked_fill(places[None, :] <= places[:, None], torch.inf)
    best, back = cost[0], []
    for _ in range(min(count, len(places) - 1) - 1):
        best, before = (best[:, None] + cost).min(0)
        back.append(before)
    ends = [torch.tensor(len(places) - 1, device=places.device)]
    for before in reversed(back):
        ends.append(before[ends[-1]])
    return torch.cat([places[:1], places[torch.stack(ends[::-1])]])
