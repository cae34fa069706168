"""Unstructured sparsity and 4 bits together: codes of what is kept, `scale * code`, with a scale per group of columns.

The layout is that of `support.py`; beside it, for groups of g columns, a multiple of 64,

    values    uint8 [n]                       codes from -8 to 7, two to a byte, the first in the lower half; those of
                                              every word of the bitmap begin a new byte. Offsets count bytes
    scales    bfloat16 [out, ceil(in / g)]    the last group may have fewer columns

Half of the entries in groups of 64 take 1 bit for the bitmap, 2 for codes, 1 / 4 for scales and 1 / 32 for half bytes
that are left empty: 3.3 bits per weight, where a grid of 4 bits takes 4.25 and a sparse weight of 16-bit values 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.sparse_matmul import SparseWeight
from trimtab.kernels.sparse_matmul.bitmap import WORD, code_bytes, pack_bits, pack_codes, unpack_codes, words
from trimtab.tensors.base import checked_buffers, shape_from_spec, stored_like
from trimtab.tensors.grid_format import GridFormat, column_codes, column_values
from trimtab.tensors.grid_search import group_parameters
from trimtab.tensors.support import SupportPart, check_support, stored_offsets

FORMAT = GridFormat(bits=4, symmetric=True, scale_dtype="bfloat16")
"""The arithmetic of codes; its group size does not count."""
_ZERO = FORMAT.levels // 2


@dataclass(frozen=True, eq=False)
class SparseGrid(SupportPart):
    """See the module for `values` and `scales`; group_size: columns that share a scale."""

    kind: ClassVar[str] = "sparse_grid"

    scales: Tensor
    group_size: int

    @classmethod
    def from_dense(
        cls, weight: Tensor, keep: Tensor, group_size: int = WORD, scales: Tensor | None = None
    ) -> SparseGrid:
        """The entries of `weight` [out, in] where `keep` (bool, same shape) is true, rounded to the nearest codes.

        `scales` bfloat16 [out, groups]; None: those of the range of what is kept in each group. Raises ConfigError for
        what cannot be stored, NumericsError for a value that is not finite.
        """
        check_support(weight, keep)
        check_group_size(group_size)
        kept = torch.where(keep, weight.float(), 0.0)
        if scales is None:
            rows, columns = kept.shape
            groups = -(-columns // group_size)
            padded = torch.nn.functional.pad(kept, (0, groups * group_size - columns))
            scales = group_scales(padded.view(rows * groups, group_size)).view(rows, groups)
        elif not bool(torch.isfinite(kept).all()):
            raise NumericsError(f"a weight of shape {list(weight.shape)} has NaN or infinity.")
        part = cls(
            int(weight.shape[1]),
            pack_bits(keep),
            torch.empty(0, dtype=torch.uint8, device=weight.device),
            stored_offsets(code_bytes(keep)),
            scales,
            group_size,
        )
        return part.nearest(kept)

    @staticmethod
    def row_lengths(mask: Tensor) -> Tensor:
        return code_bytes(mask)

    def nearest(self, target: Tensor) -> SparseGrid:
        codes = column_codes(target, self._spread(self.scales), None, FORMAT)
        return replace(self, values=pack_codes(codes.to(torch.int8) - _ZERO, self.mask()))

    def sparse_weight(self) -> SparseWeight:
        return replace(super().sparse_weight(), scales=self.scales, group_size=self.group_size)

    def continuous(self) -> dict[str, Tensor]:
        return {"scales": self.scales}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        return unpack_codes(self.values, self.mask()) * self._spread(continuous["scales"])

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> SparseGrid:
        return replace(self, scales=stored_like(self, continuous)["scales"])

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "scales": self.scales}

    def spec(self) -> dict[str, Any]:
        shape, length = list(self.shape), self.values.numel()
        return {"kind": self.kind, "shape": shape, "group_size": self.group_size, "bytes": length}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (rows, columns), length, group = shape_from_spec(spec), spec.get("bytes"), spec.get("group_size")
        where = f"sparse_grid part of shape {[rows, columns]}"
        if type(group) is not int or group < WORD or group % WORD:
            raise CheckpointError(f"{where}: 'group_size' must be a multiple of {WORD}, not {group!r}.")
        if type(length) is not int or not 0 <= length <= rows * words(columns) * WORD // 2:
            raise CheckpointError(f"{where}: 'bytes' must be a count, not {length!r}.")
        return {
            "bitmap": ((rows, words(columns)), torch.int64),
            "values": ((length,), torch.uint8),
            "offsets": ((rows + 1,), torch.int32),
            "scales": ((rows, -(-columns // group)), torch.bfloat16),
        }

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> SparseGrid:
        found = checked_buffers(cls, spec, state)
        columns = shape_from_spec(spec)[1]
        return cls(
            columns, found["bitmap"], found["values"], found["offsets"], found["scales"], int(spec["group_size"])
        )

    def check(self) -> None:
        super().check()
        keep = self.mask()
        if not torch.equal(pack_codes(unpack_codes(self.values, keep), keep), self.values):
            raise CheckpointError(
                f"sparse_grid part of shape {list(self.shape)}: half a byte behind the codes of a word is not 0."
            )

    def _spread(self, scales: Tensor) -> Tensor:
        """The scale of each entry, float32 [out, in]."""
        return scales.float().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]


def check_group_size(group_size: int) -> None:
    """Raises ConfigError for groups that are no whole words of a bitmap."""
    if group_size < WORD or group_size % WORD:
        raise ConfigError(f"groups of {group_size} columns: a scale belongs to a multiple of {WORD} columns.")


def group_scales(groups: Tensor) -> Tensor:
    """The scales bfloat16 [n] of n groups, the rows of `groups` [n, length], with zeros for what is not kept.

    Raises NumericsError for values that are not finite."""
    return group_parameters(groups, FORMAT)[0]


def rounded(column: Tensor, scales: Tensor) -> Tensor:
    """One column [out] on the grid of its group's `scales` [out], float32; no checks."""
    return column_values(column_codes(column, scales, None, FORMAT), scales, None, FORMAT)
