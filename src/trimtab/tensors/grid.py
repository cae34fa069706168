"""A weight as packed integer codes with group parameters: `w = scale * (code - zero)`.

The front of the grid modules: the arithmetic is in grid_format.py, the choice of scales in grid_search.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.grid_matmul import GridWeight
from trimtab.kernels.packing import pack, packed_bytes, unpack
from trimtab.tensors.base import Part, checked_buffers, shape_from_spec, stored_like
from trimtab.tensors.grid_format import (
    GridFormat,
    check_parameters,
    column_codes,
    column_values,
    dequantize_codes,
    matrix_shape,
    quantize_codes,
)
from trimtab.tensors.grid_search import IMATRIX_SEARCH, MSE_SEARCH, ClipSearch, grid_parameters, group_parameters

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

__all__ = [
    "IMATRIX_SEARCH",
    "MSE_SEARCH",
    "ClipSearch",
    "GridFormat",
    "GroupGrid",
    "column_codes",
    "column_values",
    "dequantize_codes",
    "grid_parameters",
    "group_parameters",
    "quantize_codes",
]


@dataclass(frozen=True, eq=False)
class GroupGrid(Part):
    """Packed codes with group parameters.

    packed    uint8 [out, packed_bytes(in, bits)], each row packed on its own (trimtab.kernels.packing)
    scales    [out, groups] along "in", [groups, in] along "out"; in `format.scale_dtype`
    zeros     in the shape of scales, in code units, in `format.zero_dtype`; None if symmetric
    """

    kind: ClassVar[str] = "grid"

    format: GridFormat
    in_features: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    def quantize(
        cls, weight: Tensor, fmt: GridFormat, clip: ClipSearch | None = None, importance: Tensor | None = None
    ) -> GroupGrid:
        """Round `weight` [out, in] to the nearest codes of its own `grid_parameters`.

        Quantizing the result anew may choose other scales (a symmetric group whose extreme code is 7 of -8 .. 7 has a
        smaller range than it began with); `project`, which keeps the scales, returns the same codes bit for bit.
        """
        scales, zeros = grid_parameters(weight, fmt, clip, importance)
        return cls.from_codes(quantize_codes(weight, scales, zeros, fmt), scales, zeros, fmt)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: GridFormat) -> GroupGrid:
        """Pack codes [out, in], integers in 0 .. 2^bits - 1. Raises ConfigError for what does not fit."""
        shape = matrix_shape(codes)
        check_parameters(scales, zeros, fmt, shape)
        if (zeros is None) != fmt.symmetric:
            raise ConfigError(f"zeros must be given exactly for an asymmetric grid: zeros={zeros}, {fmt}.")
        if scales.dtype != fmt.torch_scale_dtype or (zeros is not None and zeros.dtype != fmt.torch_zero_dtype):
            raise ConfigError(
                f"scales are {scales.dtype} and zeros {None if zeros is None else zeros.dtype}, the format stores "
                f"{fmt.scale_dtype} and {fmt.zero_dtype}: round them before codes."
            )
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if low < 0 or high >= fmt.levels:
            raise ConfigError(f"codes range from {low} to {high}; {fmt.bits} bits hold 0 to {fmt.levels - 1}.")
        packed = pack(codes.to(torch.uint8), fmt.bits)
        return cls(fmt, shape[1], packed, scales.contiguous(), None if zeros is None else zeros.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.packed.shape[0]), self.in_features

    def codes(self) -> Tensor:
        """Unpacked codes, uint8 [out, in]."""
        return unpack(self.packed, self.format.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize_codes(self.codes(), self.scales, self.zeros, self.format, dtype)

    def grid_weight(self) -> GridWeight | None:
        """None where groups run along "out"."""
        if self.format.axis == "out":
            return None
        group = self.format.group_length(self.shape)
        return GridWeight(self.packed, self.scales, self.zeros, self.format.bits, group, self.in_features)

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> GroupGrid:
        """Nearest codes to `target` with scales and zeros kept.

        Each code has a weight of its own, so nearest in any diagonal or row x column metric is nearest elementwise and
        `metric` changes nothing; for a Gram metric this is the rounding that ignores its off-diagonal (gptq does not).
        """
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for a grid of shape {list(self.shape)}.")
        if not bool(torch.isfinite(target).all()):
            raise NumericsError(f"the target of shape {list(target.shape)} has NaN or infinite values.")
        codes, old = quantize_codes(target, self.scales, self.zeros, self.format), self.codes()
        if differ:
            above = target > dequantize_codes(codes, self.scales, self.zeros, self.format)
            # the neighbour on the target's side of its nearest code is the second nearest; at an end, the only one
            neighbour = torch.where(above, codes.short() + 1, codes.short() - 1)
            last = self.format.levels - 1
            neighbour = torch.where(neighbour > last, last - 1, torch.where(neighbour < 0, 1, neighbour))
            codes = torch.where(codes == old, neighbour.to(torch.uint8), codes)
        if subset is not None:
            codes = torch.where(subset, codes, old)
        return replace(self, packed=pack(codes, self.format.bits))

    def continuous(self) -> dict[str, Tensor]:
        """Scales, and zero points if they are fractional."""
        fractional = self.zeros is not None and self.zeros.is_floating_point()
        return {
            name: value for name, value in self.state().items() if name == "scales" or (name == "zeros" and fractional)
        }

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        return dequantize_codes(self.codes(), continuous["scales"], continuous.get("zeros", self.zeros), self.format)

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> GroupGrid:
        """Raises NumericsError also for scales that are not positive once stored."""
        stored = stored_like(self, continuous)
        if not bool((stored["scales"] > 0).all()):
            raise NumericsError(f"grid part of shape {list(self.shape)}: scales must be positive in {self.format}.")
        return replace(self, scales=stored["scales"], zeros=stored.get("zeros", self.zeros))

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), **self.format.to_dict()}

    def state(self) -> dict[str, Tensor]:
        state = {"codes": self.packed, "scales": self.scales}
        return state if self.zeros is None else state | {"zeros": self.zeros}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape, fmt = shape_from_spec(spec), cls._format(spec)
        try:
            parameters = fmt.parameter_shape(shape)
        except ConfigError as error:
            raise CheckpointError(f"grid part: {error}") from None
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((shape[0], packed_bytes(shape[1], fmt.bits)), torch.uint8),
            "scales": (parameters, fmt.torch_scale_dtype),
        }
        return wanted if fmt.symmetric else wanted | {"zeros": (parameters, fmt.torch_zero_dtype)}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> GroupGrid:
        found = checked_buffers(cls, spec, state)
        return cls(cls._format(spec), shape_from_spec(spec)[1], found["codes"], found["scales"], found.get("zeros"))

    @staticmethod
    def _format(spec: Mapping[str, Any]) -> GridFormat:
        try:
            return GridFormat.from_options({k: v for k, v in spec.items() if k not in ("kind", "shape")})
        except ConfigError as error:
            raise CheckpointError(f"grid part: {error}") from None

    def check(self) -> None:
        """Raise CheckpointError if a scale is not positive and finite, or a zero point is no code or no number."""
        bad = ~(torch.isfinite(self.scales) & (self.scales > 0))
        if bool(bad.any()):
            row, group = bad.nonzero()[0].tolist()
            value = float(self.scales[row, group])
            raise CheckpointError(
                f"grid part of shape {list(self.shape)}: {int(bad.sum())} scales are not positive and finite, "
                f"the first is scales[{row}, {group}] = {value}."
            )
        if self.zeros is None or not self.zeros.numel():
            return
        if self.zeros.is_floating_point():
            if not bool(torch.isfinite(self.zeros).all()):
                raise CheckpointError(f"grid part of shape {list(self.shape)}: zero points have NaN or infinity.")
        elif int(self.zeros.max()) >= self.format.levels:
            raise CheckpointError(
                f"grid part of shape {list(self.shape)}: a zero point is {int(self.zeros.max())}; "
                f"{self.format.bits} bits hold 0 to {self.format.levels - 1}."
            )
