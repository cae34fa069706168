"""Tables of levels learnt from calibration text: a vector is a channel with fixed limits, or a token with its own."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.tensors.kv.levels import fisher_weights, fit_levels, q_norm

MAX_VALUES = 1 << 18
"""Values that a table is fitted to, evenly spread over all; at most 16 levels need no more."""


def channel_tables(
    x: Tensor,
    fisher: Tensor | None,
    *,
    bits: int,
    outliers: float,
    uniform: bool = False,
    weight_by_scale: bool = True,
    ordered: Tensor | None = None,
) -> dict[str, Tensor]:
    """Limits of each channel and the levels between them: x [T, H, d] and squared gradients of the same shape.

    ordered   x sorted along its tokens, for a caller that wants several tables of the same x
    Returns scale and minimum float16 [H, 1, d], lower and upper float32 [H, d], levels and q_norm float32 [2^bits].
    """
    if ordered is None:
        ordered = x.sort(dim=0).values  # torch.quantile takes no large tensors
    last = len(ordered) - 1
    lower, upper = ordered[round(last * outliers / 2)], ordered[round(last * (1 - outliers / 2))]
    minimum, scale = ((upper + lower) / 2).half(), ((upper - lower) / 2).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x, fisher = _sampled(x, fisher)
    inside = (x >= lower) & (x <= upper)
    normal = ((x - minimum.float()) / scale.float())[inside]
    tables = _levels(normal, fisher, scale.float().expand_as(x), inside, bits, uniform, weight_by_scale)
    return {"scale": scale[:, None], "minimum": minimum[:, None], "lower": lower, "upper": upper, **tables}


def token_tables(
    x: Tensor, fisher: Tensor | None, *, bits: int, outliers: float, uniform: bool = False, weight_by_scale: bool = True
) -> dict[str, Tensor]:
    """Levels for tokens that bring their own limits: x [T, C], whose rows are the vectors, and squared gradients.

    The limits are the (k + 1)-th largest and smallest entries, k = floor(C outliers / 2) + 1, or the extremes without
    outliers, as `KVCodec` takes them with the range rule "quantile" or "minmax".
    """
    x, fisher = _sampled(x, fisher)
    beyond = int(outliers / 2 * x.shape[1] + 1e-9) + 1 if outliers else 0
    upper = x.topk(beyond + 1, dim=1).values[:, -1:]
    lower = x.topk(beyond + 1, dim=1, largest=False).values[:, -1:]
    scale = ((upper - lower) / 2).clamp(min=1e-8)
    inside = (x >= lower) & (x <= upper)
    normal = ((x - (upper + lower) / 2) / scale)[inside]
    return _levels(normal, fisher, scale.expand_as(x), inside, bits, uniform, weight_by_scale)


def _sampled(x: Tensor, fisher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Evenly spread tokens, at most MAX_VALUES numbers of them."""
    step = -(-x.numel() // MAX_VALUES)
    return x[::step], None if fisher is None else fisher[::step]


def _levels(
    normal: Tensor,
    fisher: Tensor | None,
    scale: Tensor,
    inside: Tensor,
    bits: int,
    uniform: bool,
    weight_by_scale: bool,
) -> dict[str, Tensor]:
    if uniform:
        levels = torch.linspace(-1.0, 1.0, 1 << bits)
    else:
        weights = None
        if fisher is not None:
            weights = fisher_weights(fisher[inside], scale[inside] if weight_by_scale else None)
        levels = fit_levels(normal, bits, weights)
    return {"levels": levels, "q_norm": q_norm(levels, normal)}
