"""A weight by columns as gather_matmul takes it, and what must hold of its tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class GatherWeight:
    """W [out, in], of which an input x_j counts where |x_j| * scale_j > threshold, and left right for the others.

    columns    [in, out], the transpose of W, floating and finite
    threshold  float32 [1]; a negative one selects every column, infinity none
    scale      float32 [in], for example the norms of the columns; None: 1
    left       [out, r], floating, of one dtype with right; None: what does not count is left out
    right      [r, in]

    Nothing is checked when it is made: `check` does that, once for every set of shapes and dtypes.
    """

    columns: Tensor
    threshold: Tensor
    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.columns.shape[0]

    @property
    def out_features(self) -> int:
        return self.columns.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        found = {"columns": self.columns, "threshold": self.threshold, "scale": self.scale}
        found |= {"left": self.left, "right": self.right}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def check(self) -> None:
        """Raises ConfigError if the tensors do not fit each other."""
        _check(
            self.columns.shape,
            self.columns.dtype,
            (self.threshold.shape, self.threshold.dtype),
            None if self.scale is None else (self.scale.shape, self.scale.dtype),
            None if self.left is None else (self.left.shape, self.left.dtype),
            None if self.right is None else (self.right.shape, self.right.dtype),
        )


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    columns: torch.Size,
    dtype: torch.dtype,
    threshold: tuple[torch.Size, torch.dtype],
    scale: tuple[torch.Size, torch.dtype] | None,
    left: tuple[torch.Size, torch.dtype] | None,
    right: tuple[torch.Size, torch.dtype] | None,
) -> None:
    if len(columns) != 2 or not dtype.is_floating_point:
        raise ConfigError(f"columns are {dtype} {list(columns)}; they are floating-point numbers [in, out].")
    if tuple(threshold[0]) != (1,) or threshold[1] != torch.float32:
        raise ConfigError(f"the threshold is {threshold[1]} {list(threshold[0])}; it is one float32.")
    if scale is not None and (tuple(scale[0]) != (columns[0],) or scale[1] != torch.float32):
        raise ConfigError(f"scale is {scale[1]} {list(scale[0])}; {columns[0]} inputs take float32 [{columns[0]}].")
    if (left is None) != (right is None):
        raise ConfigError("a low-rank term has two factors; give both left and right, or neither.")
    if left is None or right is None:
        return
    fits = len(left[0]) == len(right[0]) == 2 and left[0] == (columns[1], right[0][0]) and right[0][1] == columns[0]
    if not fits or left[1] != right[1] or not left[1].is_floating_point:
        raise ConfigError(
            f"left is {left[1]} {list(left[0])} and right {right[1]} {list(right[0])}; columns {list(columns)} take "
            f"floating [{columns[1]}, r] and [r, {columns[0]}] of one dtype."
        )
