"""The contract of a reader of another library's quantized layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.grid_format import SCALE_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class ReadLayer:
    """A quantized layer as stored: name, (out, in) of the linear layer in the model, tensors by last name part."""

    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor. Raises CheckpointError if it is missing or of another shape or dtype (None: any)."""
        if name not in self.tensors:
            raise CheckpointError(f"'{name}' is missing.")
        found = self.tensors[name]
        if tuple(found.shape) != shape or (dtype is not None and found.dtype != dtype):
            raise CheckpointError(
                f"'{name}' is {found.dtype} {list(found.shape)}; the configuration wants "
                f"{'' if dtype is None else f'{dtype} '}{list(shape)}."
            )
        return found

    def scales(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The scales, in a dtype that our grids store. Raises CheckpointError."""
        found = self.tensor(name, shape)
        if found.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"'{name}' is {found.dtype}; read are {', '.join(SCALE_DTYPES)}.")
        return found


class Reader(ABC):
    """Reads the layers of one method; made from the `quantization_config` of config.json, which it checks.

    codes      last name part of the tensor that every quantized layer has
    buffers    last name parts of all tensors of a quantized layer
    """

    codes: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        """Raises CheckpointError, naming `source`, for a configuration that cannot be read."""

    @abstractmethod
    def grid(self, layer: ReadLayer) -> GroupGrid:
        """The layer as our grid. Raises CheckpointError; the caller adds the names of directory and layer."""


def checked_bits(bits: object) -> int:
    """The width of codes. Raises CheckpointError for one that our grids do not have."""
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(f"{bits} bits; trimtab's grids have 2, 3, 4 or 8.")
    return int(bits)


def checked_group(group_size: object, in_features: int) -> int:
    """Weights per group, -1 for a whole row. Raises CheckpointError for what does not divide the inputs."""
    if group_size == -1:
        return -1
    if type(group_size) is not int or group_size < 1 or in_features % group_size:
        raise CheckpointError(f"group_size {group_size!r} does not divide {in_features} inputs.")
    return group_size


def grid_of(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> GroupGrid:
    """Our grid of codes [out, in], scales [out, groups] and zero points (None: symmetric), with the same values.

    Our scales are positive. Some writers (auto-round) give a group a negative one, so that its extreme value meets the
    lowest code: there codes and zero point are counted from the other end, which makes the layer asymmetric. Where a
    scale is 0 all codes become the zero point, and the scale 1. Raises CheckpointError for NaN and infinity.
    """
    length, highest = codes.shape[1] // scales.shape[1], (1 << bits) - 1
    if bool((scales < 0).any()):
        zeros = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8) if zeros is None else zeros
        negative = scales < 0
        zeros = torch.where(negative, highest - zeros, zeros)
        codes = torch.where(negative.repeat_interleave(length, dim=1), highest - codes, codes)
    if bool((scales == 0).any()):
        zero = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8) if zeros is None else zeros
        dead = (scales == 0).repeat_interleave(length, dim=1)
        codes = torch.where(dead, zero.repeat_interleave(length, dim=1), codes)
    stored = torch.where(scales == 0, 1, scales.abs())
    fmt = GridFormat.from_options(
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": zeros is None,
            "scale_dtype": DTYPE_NAMES[scales.dtype],
        }
    )
    grid = GroupGrid.from_codes(codes, stored, zeros, fmt)
    grid.check()
    return grid
