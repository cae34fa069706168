"""Unstructured sparsity: one bit for each weight says whether it is kept, the kept values stand side by side.

The layout is that of `support.py`, with `values` in bfloat16, float16 or float32. Half of the entries in bfloat16 take
8 bits for values, 1 for the bitmap (rows are padded to 64 columns) and 32 / in for the offset: 9.1 bits per weight at
256 columns, 0.57 of dense; so does a 2:4 pattern. A kept value may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.sparse_matmul.bitmap import pack_bits, words
from trimtab.tensors.base import checked_buffers, dtype_from_spec, shape_from_spec, stored_like
from trimtab.tensors.sparse import VALUE_DTYPES
from trimtab.tensors.support import SupportPart, check_support, stored_offsets


@dataclass(frozen=True, eq=False)
class Bitmap(SupportPart):
    """See `support.py` for `bitmap`, `values` and `offsets`."""

    kind: ClassVar[str] = "bitmap"

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor, dtype: torch.dtype | None = None) -> Bitmap:
        """The entries of `weight` [out, in] where `keep` (bool, same shape) is true, stored in `dtype`, or in that of
        the weight. Raises ConfigError for what cannot be stored, NumericsError for a value beyond the dtype."""
        check_support(weight, keep)
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in VALUE_DTYPES.values():
            raise ConfigError(f"values cannot be stored in {dtype}; choose one of {', '.join(VALUE_DTYPES)}.")
        values = weight[keep].to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(
                f"a value of {float(weight.abs().max()):.4g} in a weight of shape {list(weight.shape)} is NaN, "
                f"infinite or beyond {dtype}; use a wider dtype."
            )
        return cls(int(weight.shape[1]), pack_bits(keep), values, stored_offsets(cls.row_lengths(keep)))

    @staticmethod
    def row_lengths(mask: Tensor) -> Tensor:
        return mask.sum(dim=1)

    def nearest(self, target: Tensor) -> Bitmap:
        return self.with_continuous({"values": target[self.mask()]})

    def continuous(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        values = continuous["values"].float()
        return values.new_zeros(self.shape).masked_scatter(self.mask(), values)

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> Bitmap:
        return replace(self, values=stored_like(self, continuous)["values"])

    def spec(self) -> dict[str, Any]:
        name = str(self.values.dtype).removeprefix("torch.")
        return {"kind": self.kind, "shape": list(self.shape), "dtype": name, "entries": self.values.numel()}

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
