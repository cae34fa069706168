"""What parts share that have zeros in a weight and do not store them: a *support* and what stands on it.

The support is a bitmap in the layout of `kernels/sparse_matmul/bitmap.py`, for a weight [out, in]:

    bitmap     int64 [out, ceil(in / 64)]    bit c % 64, least significant first, of word c // 64 of row i is 1 where
                                             entry (i, c) is kept. Bits past `in` are 0
    values     [n]                           what is kept, row after row, columns ascending; numbers or codes
    offsets    int32 [out + 1]               row i owns values[offsets[i] : offsets[i + 1]]; from 0 to n

It is structure, not a code: `project` keeps it. Which entries to keep is decided by `trimtab.weights`;
`SparseOutliers` is the other case, a few entries beside a grid, whose positions are chosen anew. N:M patterns are
supports like others: a bitmap takes one bit per column, no more than positions inside the groups of 2:4 would.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.kernels.sparse_matmul import SparseWeight, sparse_matmul
from trimtab.kernels.sparse_matmul.bitmap import WORD, row_offsets, unpack_bits
from trimtab.kernels.sparse_matmul.reference import dequantize
from trimtab.tensors.base import Part
from trimtab.tensors.metric import Metric

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class SupportPart(Part):
    """See the module for `bitmap`, `values` and `offsets`."""

    in_features: int
    bitmap: Tensor
    values: Tensor
    offsets: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.bitmap.shape[0]), self.in_features

    def mask(self) -> Tensor:
        """The support, bool [out, in]."""
        return unpack_bits(self.bitmap, self.in_features)

    @property
    def density(self) -> float:
        """The share of entries that are kept."""
        return int(self.mask().sum()) / (self.shape[0] * self.shape[1])

    def sparse_weight(self) -> SparseWeight:
        return SparseWeight(self.bitmap, self.values, self.offsets, self.in_features)

    def matmul(self, x: Tensor) -> Tensor:
        return sparse_matmul(x, self.sparse_weight())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(self.sparse_weight(), dtype)

    def state(self) -> dict[str, Tensor]:
        return {"bitmap": self.bitmap, "values": self.values, "offsets": self.offsets}

    @property
    def code_shape(self) -> None:
        return None

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> Self:
        """The values of `target` on this support: nearest where the metric does not tie entries of a row together.

        `subset` and `differ` are refused, because what is kept is no choice among codes; so is a Gram metric, which
        least squares serve.
        """
        if subset is not None or differ:
            raise ConfigError(f"a {self.kind} part has no codes to change: project it without a subset.")
        if metric is not None and metric.matrix is not None:
            raise ConfigError(f"a {self.kind} part is projected entry by entry; in a Gram metric solve least squares.")
        if tuple(target.shape) != self.shape:
            raise ConfigError(
                f"target of shape {list(target.shape)} for a {self.kind} part of shape {list(self.shape)}."
            )
        return self.nearest(target.float())

    @abstractmethod
    def nearest(self, target: Tensor) -> Self:
        """The part of this support, and of these scales if it has any, nearest to float32 `target` [out, in]."""

    def check(self) -> None:
        """Raise CheckpointError for a support that cannot be, or numbers that are not finite."""
        where = f"{self.kind} part of shape {list(self.shape)}"
        bits = unpack_bits(self.bitmap, WORD * self.bitmap.shape[1])
        if bool(bits[:, self.in_features :].any()):
            raise CheckpointError(f"{where}: the bitmap has bits past column {self.in_features}.")
        counted = row_offsets(self.row_lengths(bits))
        if not torch.equal(counted, self.offsets.long()) or int(counted[-1]) != self.values.numel():
            raise CheckpointError(
                f"{where}: row offsets are not those of the bitmap, which has {int(counted[-1])} values, of "
                f"{self.values.numel()}."
            )
        for name, numbers in self.continuous().items():
            if not bool(torch.isfinite(numbers).all()):
                raise CheckpointError(f"{where}: {name} have NaN or infinity.")

    @staticmethod
    @abstractmethod
    def row_lengths(mask: Tensor) -> Tensor:
        """How many of `values` each row of a support owns, int64 [out]."""


def check_support(weight: Tensor, keep: Tensor) -> None:
    """Raises ConfigError unless `weight` is a matrix [out, in] and `keep` a bool mask of its shape."""
    if weight.ndim != 2 or keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ConfigError(
            f"a sparse weight wants a matrix [out, in] and a bool mask of its shape, not {list(weight.shape)} and "
            f"{keep.dtype} {list(keep.shape)}."
        )


def stored_offsets(lengths: Tensor) -> Tensor:
    """int32 [out + 1] of how many values each row owns. Raises ConfigError for more than it can count."""
    offsets = row_offsets(lengths)
    if int(offsets[-1]) >= 2**31:
        raise ConfigError(f"{int(offsets[-1]):,} kept values are more than a row offset counts (2^31).")
    return offsets.int()
