"""Unstructured sparsity: one bit for each weight says whether it is kept, the kept values stand side by side.

For a weight [out, in] with n kept entries, W = ceil(in / 64):

    bitmap     int64 [out, W]     bit c % 64, least significant first, of word c // 64 of row i is 1 where entry (i, c)
                                  is kept; in bytes (little-endian), bit c % 8 of byte c // 8. Bits past `in` are 0
    values     [n]                kept entries, row after row, columns ascending; bfloat16, float16 or float32
    offsets    int32 [out + 1]    row i owns values[offsets[i] : offsets[i + 1]]; from 0 to n

Half of the entries in bfloat16 take 8 bits for values, 1 for the bitmap (rows are padded to 64 columns) and 32 / in for
the offset: 9.1 bits per weight at 256 columns, 0.57 of dense. A kept value may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.base import checked_buffers, dtype_from_spec, shape_from_spec
from trimtab.tensors.support import VALUE_DTYPES, SupportPart, kept_values

WORD = 64
"""Columns in one word of a bitmap."""


@dataclass(frozen=True, eq=False)
class Bitmap(SupportPart):
    """See the module for `bitmap`, `values` and `offsets`."""

    kind: ClassVar[str] = "bitmap"

    in_features: int
    bitmap: Tensor
    values: Tensor
    offsets: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor, dtype: torch.dtype | None = None) -> Bitmap:
        values = kept_values(weight, keep, dtype)
        if values.numel() >= 2**31:
            raise ConfigError(f"{values.numel():,} kept values are more than a row offset counts (2^31).")
        offsets = torch.zeros(len(keep) + 1, dtype=torch.int64, device=keep.device)
        offsets[1:] = keep.sum(dim=1).cumsum(0)
        return cls(int(weight.shape[1]), pack_bits(keep), values, offsets.int())

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.bitmap.shape[0]), self.in_features

    def mask(self) -> Tensor:
        return unpack_bits(self.bitmap, self.in_features)

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "entries": self.values.numel()}

    def state(self) -> dict[str, Tensor]:
        return {"bitmap": self.bitmap, "values": self.values, "offsets": self.offsets}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape, dtype, entries = shape_from_spec(spec), dtype_from_spec(spec, VALUE_DTYPES), spec.get("entries")
        if type(entries) is not int or not 0 <= entries <= shape[0] * shape[1]:
            raise CheckpointError(f"bitmap part of shape {list(shape)}: 'entries' must be a count, not {entries!r}.")
        return {
            "bitmap": ((shape[0], words(shape[1])), torch.int64),
            "values": ((entries,), dtype),
            "offsets": ((shape[0] + 1,), torch.int32),
        }

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Bitmap:
        found = checked_buffers(cls, spec, state)
        return cls(shape_from_spec(spec)[1], found["bitmap"], found["values"], found["offsets"])

    def support_error(self) -> str | None:
        bits = unpack_bits(self.bitmap, WORD * self.bitmap.shape[1])
        if bool(bits[:, self.in_features :].any()):
            return f"the bitmap has bits past column {self.in_features}"
        counted = torch.zeros_like(self.offsets)
        counted[1:] = bits.sum(dim=1).cumsum(0)
        if not torch.equal(counted, self.offsets) or int(counted[-1]) != self.values.numel():
            return f"row offsets are not those of the bitmap, which keeps {int(counted[-1])} of {self.values.numel()}"
        return None


def words(in_features: int) -> int:
    """Words of a bitmap's row."""
    return -(-in_features // WORD)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [rows, columns] -> int64 [rows, words(columns)], as the module describes."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask, (0, words(columns) * WORD - columns))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (padded.view(rows, -1, 8).to(torch.uint8) << places).sum(dim=-1, dtype=torch.uint8)
    return octets.view(torch.int64)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: int64 [rows, words(columns)] -> bool [rows, columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    octets = bitmap.contiguous().view(torch.uint8)
    return ((octets[..., None] >> places) & 1).bool().flatten(1)[:, :columns]
