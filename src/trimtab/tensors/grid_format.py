"""The arithmetic of integer grids: one scale, and perhaps one zero point, per group, `w = scale * (code - zero)`.

Codes are unsigned, `0 .. 2^bits - 1`. A symmetric grid stores no zero point; its zero is `2^(bits-1)`, so the signed
grid `-2^(bits-1) .. 2^(bits-1) - 1` is the same codes shifted. Which scales: grid_search.py. Stored codes: grid.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.config import Config
from trimtab.core.errors import ConfigError

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class GridFormat(Config):
    """How a grid is laid out.

    bits          bits per code
    group_size    weights that share a scale; must divide the grouped axis; -1 = the whole axis is one group
    symmetric     no zero points: zero is the code 2^(bits-1)
    axis          the axis that groups run along: "in" (columns of a row) or "out" (rows of a column)
    scale_dtype   stored dtype of the scales; codes are computed with the scales as stored
    zero_dtype    stored dtype of zero points: whole codes in a byte, or fractional ones as numbers
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 64
    symmetric: bool = True
    axis: Literal["in", "out"] = "in"
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    zero_dtype: Literal["uint8", "float16", "float32", "bfloat16"] = "uint8"

    def check(self) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"GridFormat: option group_size={self.group_size} must be positive, or -1 for the whole axis."
            )

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def torch_zero_dtype(self) -> torch.dtype:
        return torch.uint8 if self.zero_dtype == "uint8" else SCALE_DTYPES[self.zero_dtype]

    def group_length(self, shape: tuple[int, int]) -> int:
        """Weights per group in a matrix of this [out, in] shape. Raises ConfigError if groups do not fill the axis."""
        width = shape[1] if self.axis == "in" else shape[0]
        if self.group_size == -1:
            return width
        if width % self.group_size:
            divisors = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
            choice = f"one of {', '.join(map(str, divisors))}" if divisors else "a divisor"
            raise ConfigError(
                f"group_size={self.group_size} does not divide {width}, the '{self.axis}' axis of a weight of shape "
                f"{list(shape)}. Use {choice}, or -1 for one group."
            )
        return self.group_size

    def parameter_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of scales and zeros: [out, groups] along "in", [groups, in] along "out"."""
        out_features, in_features = shape
        length = self.group_length(shape)
        if self.axis == "in":
            return out_features, in_features // length
        return out_features // length, in_features


# Elementwise arithmetic. `scales` and `zeros` are as stored and broadcast against values and codes.


def column_codes(column: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> Tensor:
    """Nearest codes, uint8, of one column [out] given its group's scales [out] and zeros [out] (None: symmetric).

    Works on any tensor that the parameters broadcast against. Rounds half to even, `clip(round(w / s) + z)`; a
    fractional z is added before rounding. No checks: this is the inner loop of sequential methods.
    """
    steps = column.float() / scales.float()
    if zeros is not None and zeros.is_floating_point():
        shifted = torch.round(steps + zeros.float())
    else:
        shifted = torch.round(steps) + (fmt.levels // 2 if zeros is None else zeros.float())
    return shifted.clamp_(0, fmt.levels - 1).to(torch.uint8)


def column_values(codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> Tensor:
    """The float32 values of codes: `scale * (code - zero)`, for one column or anything that broadcasts."""
    return (codes.float() - (fmt.levels // 2 if zeros is None else zeros.float())) * scales.float()


def quantize_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> Tensor:
    """Nearest codes, uint8 [out, in], of a weight [out, in] for group parameters as `grid_parameters` gives them."""
    return column_codes(*_by_group(weight, scales, zeros, fmt), fmt).reshape(weight.shape)


def dequantize_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dense weight [out, in] of codes [out, in]; computed in float32, then rounded to `dtype`."""
    return column_values(*_by_group(codes, scales, zeros, fmt), fmt).reshape(codes.shape).to(dtype)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """(out, in). Raises ConfigError for what is no matrix, or an empty one."""
    if tensor.ndim != 2 or not tensor.numel():
        raise ConfigError(f"a grid holds a matrix [out, in], not a tensor of shape {list(tensor.shape)}.")
    return int(tensor.shape[0]), int(tensor.shape[1])


def check_parameters(scales: Tensor, zeros: Tensor | None, fmt: GridFormat, shape: tuple[int, int]) -> None:
    """Raise ConfigError if scales or zeros do not have one entry per group."""
    expected = fmt.parameter_shape(shape)
    for name, parameter in (("scales", scales), ("zeros", zeros)):
        if parameter is not None and tuple(parameter.shape) != expected:
            raise ConfigError(
                f"{name} of shape {list(parameter.shape)} do not fit a weight of shape {list(shape)}: "
                f"{fmt} wants {list(expected)}."
            )


def _by_group(
    matrix: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views with the axis of a group on its own, of length 1 in the parameters."""
    shape = matrix_shape(matrix)
    check_parameters(scales, zeros, fmt, shape)
    length = fmt.group_length(shape)
    if fmt.axis == "in":
        grouped = matrix.reshape(shape[0], -1, length)
        return grouped, scales[:, :, None], None if zeros is None else zeros[:, :, None]
    return matrix.reshape(-1, length, shape[1]), scales[:, None], None if zeros is None else zeros[:, None]
