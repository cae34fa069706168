"""What parts share that keep some entries of a weight exactly and have zeros elsewhere: a *support* and values.

The support is structure, not a code: `project` keeps it and takes new values. Which entries to keep is decided by
`trimtab.weights`; `SparseOutliers` is the other case, a few entries beside a grid, whose positions are chosen anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors.base import Part, stored_like
from trimtab.tensors.metric import Metric

if TYPE_CHECKING:
    from typing_extensions import Self

VALUE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SupportPart(Part):
    """A dataclass with a field `values`: the kept entries, row after row, columns ascending, in any shape."""

    values: Tensor

    @classmethod
    @abstractmethod
    def from_dense(cls, weight: Tensor, keep: Tensor, dtype: torch.dtype | None = None) -> Self:
        """The entries of `weight` [out, in] where `keep` (bool, same shape) is true, stored in `dtype`, or in that of
        the weight. Raises ConfigError for what cannot be stored, NumericsError for a value beyond the dtype."""

    @abstractmethod
    def mask(self) -> Tensor:
        """The support, bool [out, in]."""

    @property
    def density(self) -> float:
        """The share of entries that are kept."""
        return self.values.numel() / (self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        return dense.masked_scatter_(self.mask(), self.values.to(dtype))

    @property
    def code_shape(self) -> None:
        return None

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> Self:
        """The values of `target` on this support: nearest where the metric does not tie entries of a row together.

        A support has no codes: `subset` and `differ` are refused, and so is a Gram metric, which least squares serve.
        """
        if subset is not None or differ:
            raise ConfigError(f"a {self.kind} part has no codes to change: project it without a subset.")
        if metric is not None and metric.matrix is not None:
            raise ConfigError(f"a {self.kind} part is projected entry by entry; in a Gram metric solve least squares.")
        if tuple(target.shape) != self.shape:
            raise ConfigError(
                f"target of shape {list(target.shape)} for a {self.kind} part of shape {list(self.shape)}."
            )
        return self.with_continuous({"values": target.float()[self.mask()].reshape(self.values.shape)})

    def continuous(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        values = continuous["values"].float()
        return values.new_zeros(self.shape).masked_scatter(self.mask(), values)

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> Self:
        return replace(self, values=stored_like(self, continuous)["values"])  # type: ignore[type-var]

    def spec(self) -> dict[str, Any]:
        name = str(self.values.dtype).removeprefix("torch.")
        return {"kind": self.kind, "shape": list(self.shape), "dtype": name}

    def check(self) -> None:
        """Raise CheckpointError for a support that cannot be, or values that are not finite."""
        where = f"{self.kind} part of shape {list(self.shape)}"
        if (wrong := self.support_error()) is not None:
            raise CheckpointError(f"{where}: {wrong}.")
        if not bool(torch.isfinite(self.values).all()):
            raise CheckpointError(f"{where}: values have NaN or infinity.")

    @abstractmethod
    def support_error(self) -> str | None:
        """What is wrong with the buffers that hold the support, or None."""


def kept_values(weight: Tensor, keep: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`weight[keep]` as it is stored: row after row, in `dtype` or that of the weight. Errors as `from_dense`."""
    if weight.ndim != 2 or keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ConfigError(
            f"a sparse weight wants a matrix [out, in] and a bool mask of its shape, not {list(weight.shape)} and "
            f"{keep.dtype} {list(keep.shape)}."
        )
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in VALUE_DTYPES.values():
        raise ConfigError(f"values cannot be stored in {dtype}; choose one of {', '.join(VALUE_DTYPES)}.")
    values = weight[keep].to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(
            f"a value of {float(weight.abs().max()):.4g} in a weight of shape {list(weight.shape)} is NaN, infinite or "
            f"beyond {dtype}; use a wider dtype."
        )
    return values
