"""Which scale a group gets: from its full range, or from the shrunken range of least weighted error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.config import Config
from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.grid_format import GridFormat, column_codes, column_values, matrix_shape


@dataclass(frozen=True, kw_only=True)
class ClipSearch(Config):
    """Try the ranges `p * [min, max]` for p = 1, 1 - 1/grid, ... and keep each group's best.

    grid          p falls in steps of 1 / grid
    max_shrink    the search covers int(max_shrink * grid) values, so p stays above 1 - max_shrink
    norm          the error of a group is sum importance * |w - w_hat|^norm
    patience      stop once so many steps in a row improved no group

    The defaults, and those of IMATRIX_SEARCH, are llm-compressor's. p = 1 is always tried, so no group ends with a
    larger error (in this norm) than without the search.
    """

    grid: int = 100
    max_shrink: float = 0.2
    norm: float = 2.4
    patience: int = 5

    def check(self) -> None:
        for name, fits, allowed in (
            ("grid", self.grid >= 1, "at least 1"),
            ("max_shrink", 0 <= self.max_shrink < 1, "in [0, 1)"),
            ("norm", self.norm > 0, "positive"),
            ("patience", self.patience >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(f"ClipSearch: option {name}={getattr(self, name)} must be {allowed}.")


MSE_SEARCH = ClipSearch()
IMATRIX_SEARCH = ClipSearch(grid=20, max_shrink=0.95, norm=3.0)


def grid_parameters(
    weight: Tensor, fmt: GridFormat, clip: ClipSearch | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros (None if symmetric), in their stored dtypes, of every group of `weight` [out, in].

    Symmetric: `s = max|w| / ((2^b - 1) / 2)`, so the largest positive weight may clip by half a step, as in
    compressed-tensors. Asymmetric: 0 is forced into the range, `s = (max - min) / (2^b - 1)`, `z = round(-min / s)`.
    A group of zeros gets the dtype's eps; a scale that would round to 0 gets the dtype's smallest positive value.
    Scales are rounded to the stored dtype before z, and any code, is computed with them.

    clip         shrink each group's range to the least |error|^norm (None: the full range)
    importance   weights [in] or [out, in] of that error, such as E[x_j^2]; selects IMATRIX_SEARCH if clip is None

    Raises ConfigError if the group size does not divide the axis, NumericsError if the weight has NaN or infinity, or
    a scale overflows its dtype.
    """
    shape = matrix_shape(weight)
    along_in = weight if fmt.axis == "in" else weight.t()
    if importance is not None:
        importance = importance.expand(shape)
        importance = importance if fmt.axis == "in" else importance.t()
    length = fmt.group_length(shape)
    rows = along_in.reshape(-1, length)
    row_importance = None if importance is None else importance.reshape(-1, length)
    scales, zeros = group_parameters(rows, fmt, clip, row_importance)
    stored = fmt.parameter_shape(shape)
    if fmt.axis == "in":
        return scales.reshape(stored), None if zeros is None else zeros.reshape(stored)
    turned = (stored[1], stored[0])
    return scales.reshape(turned).t().contiguous(), None if zeros is None else zeros.reshape(turned).t().contiguous()


def group_parameters(
    rows: Tensor, fmt: GridFormat, clip: ClipSearch | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [n] and zeros [n] (None if symmetric) of n groups given as the rows of `rows` [n, length].

    `fmt` gives bits, symmetry and scale dtype; its group size and axis do not matter here. `importance` [n, length].
    The entry for sequential methods that choose a group's parameters from weights already compensated: pass the columns
    of the group. See `grid_parameters` for the formulas and what is raised.
    """
    values = rows.float()
    _refuse_non_finite(values)
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    if clip is None and importance is None:
        return range_parameters(low, high, fmt)
    clip = clip or IMATRIX_SEARCH
    weights = None if importance is None else importance.float()
    best: tuple[Tensor, Tensor | None] | None = None
    best_error = torch.full_like(low, torch.inf)
    unimproved = 0
    for step in range(max(1, int(clip.max_shrink * clip.grid))):
        p = 1 - step / clip.grid
        scales, zeros = range_parameters(p * low, p * high, fmt)
        columns = scales[:, None], None if zeros is None else zeros[:, None]
        error = (column_values(column_codes(values, *columns, fmt), *columns, fmt) - values).abs_().pow_(clip.norm)
        total = (error if weights is None else error * weights).sum(dim=1)
        better = total < best_error
        if best is None:
            best, best_error = (scales, zeros), total
            continue
        unimproved = 0 if bool(better.any()) else unimproved + 1
        if unimproved >= clip.patience:
            break
        best_zeros = None if zeros is None or best[1] is None else torch.where(better, zeros, best[1])
        best = torch.where(better, scales, best[0]), best_zeros
        best_error = torch.where(better, total, best_error)
    assert best is not None
    return best


def range_parameters(low: Tensor, high: Tensor, fmt: GridFormat) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of groups whose values lie in [low, high], low <= 0 <= high, all [n] float32."""
    if fmt.symmetric:
        exact = torch.maximum(-low, high) / ((fmt.levels - 1) / 2)
    else:
        exact = high / (fmt.levels - 1) - low / (fmt.levels - 1)  # the difference itself may overflow
    scales = _stored(exact, fmt)
    if fmt.symmetric:
        return scales, None
    exact = (-low / scales.float()).clamp_(0, fmt.levels - 1)
    return scales, (exact.round() if fmt.zero_dtype == "uint8" else exact).to(fmt.torch_zero_dtype)


def _stored(exact: Tensor, fmt: GridFormat) -> Tensor:
    dtype = fmt.torch_scale_dtype
    limits = torch.finfo(dtype)
    stored = exact.to(dtype)
    if bool(torch.isinf(stored).any()):
        group = int(torch.isinf(stored).nonzero()[0])
        raise NumericsError(
            f"the scale of group {group}, {float(exact[group]):.4g}, is beyond {fmt.scale_dtype} (at most "
            f"{limits.max:.4g}). Use scale_dtype='bfloat16' or 'float32', or look for a broken weight."
        )
    smallest = limits.smallest_normal if dtype != torch.float16 else 2.0**-24  # float16 needs its subnormals
    return torch.where(exact == 0, limits.eps, stored.clamp(min=smallest)).to(dtype)


def _refuse_non_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
        raise NumericsError(
            f"a weight to be quantized has {nan} NaN and {infinite} infinite values in float32, of {values.numel()}."
        )
