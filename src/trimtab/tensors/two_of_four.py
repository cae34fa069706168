"""2:4 sparsity: of every four neighbouring columns of a row, two are kept.

    values       [out, in / 2]    the kept entries, columns ascending; bfloat16, float16 or float32
    positions    uint8 [out, b]   the column 0 .. 3 of each value inside its four, as 2-bit codes packed by
                                  `trimtab.kernels.packing` (b = packed_bytes(in / 2, 2)); pairs ascend

Rows have equal lengths, so no offsets are needed: in bfloat16 8 bits for values and 1 for positions, 0.5625 of dense.
A kept value may be 0: four columns with more than two zeros are no exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.kernels.packing import pack, packed_bytes, unpack
from trimtab.tensors.base import checked_buffers, dtype_from_spec, shape_from_spec
from trimtab.tensors.support import VALUE_DTYPES, SupportPart, kept_values


@dataclass(frozen=True, eq=False)
class TwoOfFour(SupportPart):
    """See the module for `values` and `positions`."""

    kind: ClassVar[str] = "two_of_four"

    values: Tensor
    positions: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor, dtype: torch.dtype | None = None) -> TwoOfFour:
        """`keep` must have exactly two of every four columns; raises ConfigError naming a place where it has not."""
        values = kept_values(weight, keep, dtype)
        rows, columns = keep.shape
        if columns % 4:
            raise ConfigError(f"{columns} columns are no multiple of 4.")
        wrong = (keep.view(rows, -1, 4).sum(dim=-1) != 2).nonzero()
        if len(wrong):
            row, group = wrong[0].tolist()
            raise ConfigError(f"row {row} does not keep two of columns {4 * group} to {4 * group + 3}.")
        places = keep.nonzero()[:, 1] % 4
        return cls(values.view(rows, -1), pack(places.to(torch.uint8).view(rows, -1), 2))

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), 2 * int(self.values.shape[1])

    def mask(self) -> Tensor:
        places = unpack(self.positions, 2, self.values.shape[1]).long()
        start = torch.arange(places.shape[1], device=places.device) // 2 * 4
        kept = torch.zeros(self.shape, dtype=torch.bool, device=places.device)
        return kept.scatter_(1, places + start, True)

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values, "positions": self.positions}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (rows, columns), dtype = shape_from_spec(spec), dtype_from_spec(spec, VALUE_DTYPES)
        if columns % 4:
            raise CheckpointError(f"two_of_four part: {columns} columns are no multiple of 4.")
        kept = columns // 2
        return {"values": ((rows, kept), dtype), "positions": ((rows, packed_bytes(kept, 2)), torch.uint8)}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> TwoOfFour:
        found = checked_buffers(cls, spec, state)
        return cls(found["values"], found["positions"])

    def support_error(self) -> str | None:
        places = unpack(self.positions, 2, self.values.shape[1])
        if bool((places[:, ::2] >= places[:, 1::2]).any()):
            return "the two positions of a group do not ascend"
        return None
