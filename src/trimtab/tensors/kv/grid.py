"""Group ranges of cached keys and values, and the nearest codes. Tensors here are channels first: y [R, C, P] float32.

R rows of the batch, C = H d channels of all heads in the order they are stored, P tokens, the block padded by copies
of its last token. A group runs over tokens of one channel or over channels of one token; both are views of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError

FLOAT16_MAX = 65504.0
_COMPARISONS = 16  # up to so many levels, comparing with each midpoint is faster than a binary search


def grouped(y: Tensor, *, group_tokens: int = 0, group_channels: int = 0) -> tuple[Tensor, int]:
    """A view of y [R, C, P] with one more dimension, and which of its dimensions runs over the members of a group."""
    if group_tokens:
        return torch.unflatten(y, 2, (-1, group_tokens)), 3
    if group_channels:
        return torch.unflatten(y, 1, (-1, group_channels)), 2
    raise ConfigError("a grid needs groups over tokens or over channels.")


def range_parameters(low: Tensor, high: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
    """(minimum, scale) float16 of groups that span low ... high, rounded as they are stored.

    steps   2^bits - 1 steps of a uniform grid: minimum = low, scale = (high - minimum) / steps. None: for a table of
            levels in [-1, 1]: minimum is the centre, and scale reaches the farther end.

    Computed from the rounded minimum, scale reaches `high` also where float16 is coarse (large means). A group whose
    scale rounds to 0 (constant, or a range below float16) has scale 1 on a uniform grid, so code 0 is its minimum, and
    scale 0 with a table, so every code is its centre. What exceeds float16 saturates at +-65504.
    """
    centre = low if steps is not None else low / 2 + high / 2
    minimum = centre.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    stored = minimum.float()
    span = (high - stored) / steps if steps is not None else torch.maximum(high - stored, stored - low)
    scale = span.clamp(max=FLOAT16_MAX).half()
    usable = (scale > 0) & (high > low)
    return minimum, torch.where(usable, scale, torch.full_like(scale, 0.0 if steps is None else 1.0))


def normalise_(groups: Tensor, minimum: Tensor, scale: Tensor) -> Tensor:
    """(groups - minimum) / scale in place, with a scale of 0 read as 1."""
    scale = scale.float()
    return groups.sub_(minimum.float()).div_(torch.where(scale > 0, scale, torch.ones_like(scale)))


def nearest_step(z: Tensor, steps: int, *, keep: bool) -> Tensor:
    """uint8 codes 0 ... steps nearest to z (halves to even). Overwrites z unless `keep`."""
    rounded = torch.round(z) if keep else z.round_()
    return rounded.clamp_(0, steps).to(torch.uint8)


def nearest_level(z: Tensor, levels: Tensor) -> Tensor:
    """uint8 index of the nearest of `levels` (ascending); halfway, the lower index."""
    middles = (levels[1:] + levels[:-1]) / 2
    if len(levels) > _COMPARISONS:
        return torch.bucketize(z, middles, out_int32=True).to(torch.uint8)
    codes = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
    for middle in middles.tolist():
        codes += z > middle
    return codes
