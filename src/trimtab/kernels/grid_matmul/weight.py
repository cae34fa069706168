"""One packed weight as the grid kernels take it, and what must hold of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.library import ZERO_DTYPES
from trimtab.kernels.packing import packed_bytes

MAX_LEVEL_BITS = 4
"""Most bits of codes that are looked up in a table of levels."""


@dataclass(frozen=True, eq=False)
class GridWeight:
    """A weight [out, in] of packed codes: `scale * (code - zero)`, or `scale * levels[code]`.

    packed      uint8 [out, packed_bytes(in, bits)], the layout of kernels/packing.py
    scales      [out, groups]; float16, bfloat16 or float32
    zeros       [out, groups] in code units, whole (uint8) or not (float16, bfloat16, float32); None: 2^(bits-1) for all
    group_size  weights along `in` that share a scale, a divisor of in_features; -1: the whole row
    levels      float32 [2^bits], one table for all rows, or [out, 2^bits], one per row; then zeros are None and bits
                are at most 4

    Nothing is checked when it is made: `check` does that, once for every set of shapes and dtypes.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    in_features: int
    levels: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros, "levels": self.levels}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def check(self) -> None:
        """Raises ConfigError if the tensors do not fit each other."""
        zeros, levels = self.zeros, self.levels
        _check(
            self.packed.shape,
            self.packed.dtype,
            self.scales.shape,
            self.scales.dtype,
            None if zeros is None else (zeros.shape, zeros.dtype),
            None if levels is None else (levels.shape, levels.dtype),
            self.bits,
            self.group_size,
            self.in_features,
        )


def check_all(weights: Sequence[GridWeight]) -> None:
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
    packed: torch.Size,
    packed_dtype: torch.dtype,
    scales: torch.Size,
    scales_dtype: torch.dtype,
    zeros: tuple[torch.Size, torch.dtype] | None,
    levels: tuple[torch.Size, torch.dtype] | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    length = packed_bytes(in_features, bits)
    if len(packed) != 2 or packed[1] != length or packed_dtype != torch.uint8:
        raise ConfigError(
            f"packed codes are {packed_dtype} {list(packed)}; {in_features} inputs at {bits} bits take "
            f"uint8 [out, {length}]."
        )
    group = in_features if group_size == -1 else group_size
    if group < 1 or in_features % group:
        raise ConfigError(
            f"group_size={group_size} does not divide in_features={in_features}; -1 is one group per row."
        )
    wanted = (packed[0], in_features // group)
    for name, shape in (("scales", scales), ("zeros", zeros and zeros[0])):
        if shape is not None and tuple(shape) != wanted:
            raise ConfigError(
                f"{name} are {list(shape)}; groups of {group_size} over {in_features} take {list(wanted)}."
            )
    if zeros is not None and zeros[1] not in ZERO_DTYPES:
        raise ConfigError(
            f"zeros are {zeros[1]}; zero points are numbers in code units, uint8, float16, bfloat16 or float32."
        )
    if not scales_dtype.is_floating_point:
        raise ConfigError(f"scales are {scales_dtype}; they are floating-point numbers.")
    if levels is not None:
        _check_levels(*levels, zeros is not None, bits, packed[0])


def _check_levels(shape: torch.Size, dtype: torch.dtype, has_zeros: bool, bits: int, rows: int) -> None:
    if bits > MAX_LEVEL_BITS:
        raise ConfigError(f"levels are for up to {MAX_LEVEL_BITS} bits, not {bits}; 8-bit codes have scales and zeros.")
    if has_zeros:
        raise ConfigError("levels and zeros exclude each other: put the shift into the levels.")
    size = 2**bits
    if tuple(shape) not in ((size,), (rows, size)) or dtype != torch.float32:
        raise ConfigError(
            f"levels are {dtype} {list(shape)}; {bits} bits take float32 [{size}], "
            f"or [{rows}, {size}] for a table per row."
        )
