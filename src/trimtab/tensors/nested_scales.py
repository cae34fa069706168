"""Scales that are quantized themselves: small codes, one maximum per block of scales, one offset per matrix.

With scales a >= 0, one per group of weights, in blocks of B1:

    off = min a over the matrix         A = max (a - off) over the block, stored in the dtype b1
    a~ = round((a - off) (2^b0 - 1) / A) / (2^b0 - 1) A + off                     (codes of b0 bits; off if A = 0)

This is LQ-LoRA's quantizer of scales, arXiv:2311.12023. b0 = 8, B1 = 256 and float32 take as many bytes as the double
quantization of QLoRA (arXiv:2305.14314), 0.127 bits per weight in groups of 64, and stand for it here: QLoRA subtracts
the mean and stores an 8-bit number with a varying exponent, which is made for values around zero. Scales lie on one
side of their minimum, so a uniform code serves them as well, and one scheme is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.config import Config
from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.packing import pack, packed_bytes, unpack
from trimtab.tensors.grid_format import SCALE_DTYPES


@dataclass(frozen=True, kw_only=True)
class NestedFormat(Config):
    """How scales are quantized.

    bits          b0, bits of each scale's code
    block_size    B1, scales that share a maximum; blocks run over the scales row after row, the last may be shorter
    dtype         b1, stored dtype of the maxima
    """

    bits: Literal[2, 3, 4, 8] = 8
    block_size: int = 256
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def check(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"NestedFormat: option block_size={self.block_size} must be at least 1.")

    @property
    def last_code(self) -> int:
        """2^b0 - 1."""
        return (1 << self.bits) - 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.dtype]


@dataclass(frozen=True, eq=False)
class NestedScales:
    """The quantized scales of one matrix.

    shape     (out, groups) of the scales
    codes     uint8 [1, packed_bytes(out * groups, bits)], all codes row after row (kernels/packing.py)
    maxima    [blocks], A of each block, in `format.dtype`
    offset    float32 [1]
    """

    format: NestedFormat
    shape: tuple[int, int]
    codes: Tensor
    maxima: Tensor
    offset: Tensor

    @classmethod
    def quantize(cls, scales: Tensor, fmt: NestedFormat) -> NestedScales:
        """Nearest codes of `scales` [out, groups], not negative, for maxima as they are stored.

        A maximum that was rounded down saturates the codes above it. Raises NumericsError if one overflows its dtype.
        """
        shape = int(scales.shape[0]), int(scales.shape[1])
        flat = scales.float().flatten()
        offset = flat.min().reshape(1)
        above = _blocks(flat - offset, fmt.block_size)
        maxima = above.amax(dim=1).to(fmt.torch_dtype)
        if not bool(torch.isfinite(maxima).all()):
            raise NumericsError(
                f"the largest scale of a {list(shape)} matrix, {float(flat.max()):.4g}, is beyond {fmt.dtype}. Use "
                "float32 for the maxima of nested scales, or look for a broken weight."
            )
        maximum = maxima.float()[:, None]
        steps = torch.where(maximum > 0, above * fmt.last_code / maximum, 0.0)
        codes = steps.round_().clamp_(0, fmt.last_code).to(torch.uint8).flatten()[: len(flat)]
        return cls(fmt, shape, pack(codes[None], fmt.bits), maxima, offset)

    def values(self) -> Tensor:
        """The scales a~, float32 [out, groups]."""
        return self.dense(self.continuous())

    def continuous(self) -> dict[str, Tensor]:
        """The stored numbers that are no codes."""
        return {"scale_maxima": self.maxima, "scale_offset": self.offset}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        """The scales with other numbers beside the codes; differentiable in them."""
        fmt, count = self.format, self.shape[0] * self.shape[1]
        steps = _blocks(unpack(self.codes, fmt.bits, count)[0].float() / fmt.last_code, fmt.block_size)
        scales = steps * continuous["scale_maxima"].float()[:, None] + continuous["scale_offset"].float()
        return scales.flatten()[:count].reshape(self.shape)

    def state(self) -> dict[str, Tensor]:
        """The buffers as stored; all names begin with `scale_`."""
        return {"scale_codes": self.codes, **self.continuous()}

    @staticmethod
    def buffers(fmt: NestedFormat, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the buffers for scales of this [out, groups] shape."""
        count = shape[0] * shape[1]
        return {
            "scale_codes": ((1, packed_bytes(count, fmt.bits)), torch.uint8),
            "scale_maxima": ((-(-count // fmt.block_size),), fmt.torch_dtype),
            "scale_offset": ((1,), torch.float32),
        }

    @classmethod
    def from_state(cls, fmt: NestedFormat, shape: tuple[int, int], state: Mapping[str, Tensor]) -> NestedScales:
        """From buffers that were checked against `buffers`."""
        return cls(fmt, shape, state["scale_codes"], state["scale_maxima"], state["scale_offset"])

    def check(self) -> None:
        """Raise CheckpointError if the maxima or the offset are negative or not finite."""
        for name, value in self.continuous().items():
            if not bool((torch.isfinite(value) & (value >= 0)).all()):
                raise CheckpointError(f"nested scales of shape {list(self.shape)}: '{name}' is negative or not finite.")


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [blocks, size], padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
