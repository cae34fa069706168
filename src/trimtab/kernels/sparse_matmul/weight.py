"""One weight of which entries are left out as the sparse kernels take it, and what must hold of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.sparse_matmul.bitmap import WORD, words


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight [out, in], zero but for what its bitmap keeps: numbers, or 4-bit codes that stand for `scale * code`.

    bitmap      int64 [out, words(in)], the layout of bitmap.py
    values      numbers [n] float32, bfloat16 or float16, row after row, columns ascending; or the bytes uint8 [n] of
                codes from -8 to 7, as `pack_codes` packs them
    offsets     int32 [out + 1]; row i owns values[offsets[i] : offsets[i + 1]]
    scales      bfloat16 [out, ceil(in / group_size)] with codes, else None
    group_size  columns that share a scale, a multiple of 64; the last group may have fewer. 0 without scales

    Nothing is checked when it is made: `check` does that, once for every set of shapes and dtypes.
    """

    bitmap: Tensor
    values: Tensor
    offsets: Tensor
    in_features: int
    scales: Tensor | None = None
    group_size: int = 0

    @property
    def out_features(self) -> int:
        return self.bitmap.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        found = {"bitmap": self.bitmap, "values": self.values, "offsets": self.offsets}
        return found if self.scales is None else {**found, "scales": self.scales}

    def check(self) -> None:
        """Raises ConfigError if the tensors do not fit each other. That bitmap and offsets agree is not looked at: a
        checkpoint's are when it is loaded."""
        _check(
            self.bitmap.shape,
            self.bitmap.dtype,
            self.values.shape,
            self.values.dtype,
            self.offsets.shape,
            self.offsets.dtype,
            None if self.scales is None else (self.scales.shape, self.scales.dtype),
            self.group_size,
            self.in_features,
        )


def check_all(weights: Sequence[SparseWeight]) -> None:
    """Raises ConfigError if there are none, one is wrong, or they do not take the same x."""
    if not weights:
        raise ConfigError("no weights to multiply by; give at least one.")
    for weight in weights:
        weight.check()
        if weight.in_features != weights[0].in_features:
            found = [weight.in_features for weight in weights]
            raise ConfigError(f"weights of one x have equal in_features, not {found}; call once for each x.")


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    bitmap: torch.Size,
    bitmap_dtype: torch.dtype,
    values: torch.Size,
    values_dtype: torch.dtype,
    offsets: torch.Size,
    offsets_dtype: torch.dtype,
    scales: tuple[torch.Size, torch.dtype] | None,
    group_size: int,
    in_features: int,
) -> None:
    if in_features < 1 or len(bitmap) != 2 or bitmap[1] != words(in_features) or bitmap_dtype != torch.int64:
        raise ConfigError(
            f"the bitmap is {bitmap_dtype} {list(bitmap)}; {in_features} inputs take int64 [out, {words(in_features)}]."
        )
    if tuple(offsets) != (bitmap[0] + 1,) or offsets_dtype != torch.int32:
        raise ConfigError(
            f"offsets are {offsets_dtype} {list(offsets)}; {bitmap[0]} rows take int32 [{bitmap[0] + 1}]."
        )
    if scales is None:
        if len(values) != 1 or not values_dtype.is_floating_point:
            raise ConfigError(f"values are {values_dtype} {list(values)}; they are a vector of floating-point numbers.")
        return
    if len(values) != 1 or values_dtype != torch.uint8:
        raise ConfigError(f"codes are {values_dtype} {list(values)}; values with scales are a vector of uint8.")
    if group_size < WORD or group_size % WORD:
        raise ConfigError(f"group_size={group_size} must be a multiple of {WORD} columns.")
    wanted = (bitmap[0], -(-in_features // group_size))
    if tuple(scales[0]) != wanted or scales[1] != torch.bfloat16:
        raise ConfigError(
            f"scales are {scales[1]} {list(scales[0])}; groups of {group_size} over {in_features} take bfloat16 "
            f"{list(wanted)}."
        )
