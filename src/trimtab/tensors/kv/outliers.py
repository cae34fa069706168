"""Single entries of a block that are stored exactly, and their layout in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention.run import TILE
from trimtab.tensors.kv.grid import FLOAT16_MAX


@dataclass(frozen=True, eq=False, kw_only=True)
class OutlierRule:
    """Which entries are outliers: the extremes of each vector, or what lies outside fixed limits.

    fraction        of the entries of a vector: floor(length * fraction / 2) largest and as many smallest (GEAR)
    along           "tokens": a vector is a channel over the tokens of the block; "channels": a token over all heads
    lower, upper    float32 [H, d]; instead of a fraction: outliers are below lower or above upper (KVQuant's keys)
    cap             with limits: at most so many per token and side, those farthest out in units of the channel's range;
                    the rest saturates. None: all of them

    Raises ConfigError for a rule that does not hold together.
    """

    fraction: float = 0.0
    along: str = "tokens"
    lower: Tensor | None = None
    upper: Tensor | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.along not in ("tokens", "channels"):
            raise ConfigError(f"outliers along {self.along!r}; vectors run along 'tokens' or 'channels'.")
        if (self.lower is None) != (self.upper is None):
            raise ConfigError("outlier limits come as a pair: give both lower and upper, or neither.")
        if self.lower is not None and self.upper is not None:
            if self.fraction:
                raise ConfigError(f"outliers have limits or a fraction ({self.fraction}), not both.")
            if self.lower.ndim != 2 or self.lower.shape != self.upper.shape:
                shapes = f"{list(self.lower.shape)} and {list(self.upper.shape)}"
                raise ConfigError(f"outlier limits have shapes {shapes}; both must be [H, d].")
        elif not 0 < self.fraction <= 1:
            raise ConfigError(f"a fraction of {self.fraction} outliers; it must be above 0, at most 1, or give limits.")
        if self.cap is not None and (self.cap < 1 or self.lower is None):
            raise ConfigError(f"cap={self.cap} is for outliers with limits, and at least 1.")

    def per_side(self, length: int, *, quantile: bool) -> int:
        """Outliers at each end of a vector of so many entries. `quantile`: KVQuant's count, one more."""
        return min(math.floor(length * self.fraction / 2 + 1e-9) + quantile, (length + 1) // 2)

    def split_(self, y: Tensor, tokens: int, *, quantile: bool) -> tuple[Tensor, Tensor]:
        """Take the outliers out of y [R, C, P]: their int64 places in the flat y, unordered, and their values.

        Only the first `tokens` of the P are looked at. By fraction, y gets in their place the mean of their vector
        (GEAR) or, with `quantile`, the limit of what remains (KVQuant). Entries outside limits stay as they are: codes
        saturate.
        """
        inside = y[..., :tokens]
        if self.lower is not None and self.upper is not None:
            flat = self._outside(inside, y, self.lower.flatten()[:, None], self.upper.flatten()[:, None])
            return flat, y.flatten()[flat]
        dim = 2 if self.along == "tokens" else 1
        length = inside.shape[dim]
        k = self.per_side(length, quantile=quantile)
        if k == 0:
            return torch.empty(0, dtype=torch.int64, device=y.device), y.new_empty(0)

        def turned(t: Tensor) -> Tensor:
            return t if dim == 2 else t.transpose(1, 2)

        vectors = turned(inside).clone(memory_format=torch.contiguous_format)  # top-k is fast along the last dimension
        mean = vectors.mean(2, keepdim=True)
        high = vectors.topk(min(k + quantile, length))
        high_places = high.indices[..., :k]
        vectors.scatter_(2, high_places, torch.inf)  # or equal numbers would be chosen on both sides
        low_count = min(k, length - k)
        low = vectors.topk(min(low_count + quantile, length), largest=False)
        places = torch.cat([high_places, low.indices[..., :low_count]], dim=2)
        values = torch.cat([high.values[..., :k], low.values[..., :low_count]], dim=2)
        if quantile:
            inside.clamp_(turned(low.values[..., -1:]), turned(high.values[..., -1:]))
        else:
            inside.scatter_(dim, turned(places), turned(mean.expand_as(places)))
        row = torch.arange(y.shape[0], device=y.device)[:, None, None] * y.shape[1]
        vector = torch.arange(places.shape[1], device=y.device)[:, None]
        flat = (row + vector) * y.shape[2] + places if dim == 2 else (row + places) * y.shape[2] + vector
        return flat.flatten(), values.flatten()

    def _outside(self, inside: Tensor, y: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        half = ((upper - lower) / 2).clamp(min=torch.finfo(torch.float32).tiny)
        z = (inside - (upper + lower) / 2) / half
        flat = torch.arange(y.numel(), device=y.device).view(y.shape)[..., : inside.shape[2]]
        if self.cap is None or self.cap >= y.shape[1]:
            return flat[z.abs() > 1]
        found = []
        for side in (z, -z):
            top = side.topk(self.cap, dim=1)
            found.append(flat.gather(1, top.indices)[top.values > 1])
        return torch.cat(found)


def outlier_rows(
    flat: Tensor, values: Tensor, shape: tuple[int, int, int, int], tiles: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Starts, places and values as in run.py, one of each per row of the batch.

    flat, values   as `OutlierRule.split_` returns them; values are rounded to `dtype`, beyond float16 to +-65504
    shape          R, H, d, P
    """
    rows, heads, dim, padded = shape
    head, channel, token = flat // (dim * padded), flat // padded % dim, flat % padded
    key, order = (((head * tiles + token // TILE) * dim + channel) * TILE + token % TILE).sort()
    values = values[order]
    if dtype == torch.float16:
        values = values.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    counts = torch.bincount(key // (dim * TILE), minlength=rows * heads * tiles).view(rows, -1)
    starts = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).to(torch.int32)
    sizes = counts.sum(1).tolist()
    places = (key % (dim * TILE)).to(torch.int16)  # wraps: read as unsigned
    return starts.unbind(0), torch.split(places, sizes), torch.split(values.to(dtype), sizes)
