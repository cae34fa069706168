"""Sparse parts: the few entries of a weight that no grid holds well, kept exactly at their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.terms import FEW_ROWS, sparse_add
from trimtab.tensors.base import Part, checked_buffers, dtype_from_spec, shape_from_spec, stored_like
from trimtab.tensors.metric import Metric

VALUE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_GATHER_ROWS = 16  # inputs with more rows multiply the dense matrix, which is faster from there on


@dataclass(frozen=True, eq=False)
class SparseOutliers(Part):
    """Compressed sparse rows.

    values     [n] floating; row after row, columns ascending within a row
    columns    int32 [n]
    offsets    int32 [out + 1]; row i owns entries offsets[i] .. offsets[i + 1]
    """

    kind: ClassVar[str] = "sparse"

    in_features: int
    values: Tensor
    columns: Tensor
    offsets: Tensor

    @classmethod
    def from_entries(cls, shape: tuple[int, int], rows: Tensor, columns: Tensor, values: Tensor) -> SparseOutliers:
        """From entries [n] in any order. Raises ConfigError for a position outside `shape` or given twice."""
        if not rows.shape == columns.shape == values.shape == (values.numel(),):
            raise ConfigError(
                f"rows {list(rows.shape)}, columns {list(columns.shape)} and values {list(values.shape)} must be "
                "vectors of one length."
            )
        if values.dtype not in VALUE_DTYPES.values():
            raise ConfigError(f"values are {values.dtype}; want one of {', '.join(VALUE_DTYPES)}.")
        rows, columns = rows.long(), columns.long()
        outside = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
        if bool(outside.any()):
            entry = int(outside.nonzero()[0])
            raise ConfigError(
                f"position ({int(rows[entry])}, {int(columns[entry])}) is outside the shape {list(shape)}."
            )
        flat, order = torch.sort(rows * shape[1] + columns)
        repeated = flat[1:] == flat[:-1]
        if bool(repeated.any()):
            position = int(flat[int(repeated.nonzero()[0])])
            raise ConfigError(f"position ({position // shape[1]}, {position % shape[1]}) is given twice.")
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
        offsets[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        return cls(
            shape[1], values[order].contiguous(), (flat % shape[1]).int() if shape[1] else flat.int(), offsets.int()
        )

    @classmethod
    def select(
        cls, target: Tensor, fraction: float, metric: Metric | None = None, *, dtype: torch.dtype = torch.float16
    ) -> SparseOutliers:
        """The round(fraction * out * in) entries of `target` with the largest weighted magnitude.

        The magnitude of an entry is |D_ij| times the root of its weight in `metric`; a Gram metric counts by its
        diagonal. Equal magnitudes go to the lower index. Raises ConfigError for a fraction outside [0, 1],
        NumericsError for NaN or infinity in the target or a value beyond `dtype`.
        """
        if not 0 <= fraction <= 1:
            raise ConfigError(f"fraction={fraction} of entries to keep must be in [0, 1].")
        if target.ndim != 2:
            raise ConfigError(f"sparse selection wants a matrix [out, in], not a tensor of shape {list(target.shape)}.")
        return _largest(target, round(fraction * target.numel()), metric, None, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.offsets.shape[0]) - 1, self.in_features

    def rows(self) -> Tensor:
        """Row of each entry, int64 [n]."""
        counts = (self.offsets[1:] - self.offsets[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.shape[0], device=counts.device), counts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        dense[self.rows(), self.columns.long()] = self.values.to(dtype)
        return dense

    def matmul(self, x: Tensor) -> Tensor:
        """Gathers inputs for a few rows of x (float32 sums at least), else multiplies the dense matrix."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] > _GATHER_ROWS:
            return torch.nn.functional.linear(x, self.dequantize(x.dtype))
        wide = torch.promote_types(torch.promote_types(x.dtype, self.values.dtype), torch.float32)
        products = flat[:, self.columns.long()].to(wide) * self.values.to(wide)
        out = products.new_zeros(flat.shape[0], self.shape[0]).index_add_(1, self.rows(), products)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        if x.shape.numel() <= FEW_ROWS * x.shape[-1]:
            return sparse_add(out, x, self.values, self.columns, self.offsets)
        return out + self.matmul(x)

    @property
    def code_shape(self) -> None:
        """Entries have positions, which `project` places, but no codes to choose from."""
        return None

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> SparseOutliers:
        """As many entries as now, placed at the largest weighted magnitudes of `target`, with its values.

        Positions are the discrete part here. With `subset` (bool [out, in]), entries outside it stay as they are, and
        those inside are placed anew inside. `differ` is refused.
        """
        if differ:
            raise ConfigError("a sparse part has no codes of which another could be chosen.")
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for a sparse part of shape {list(self.shape)}.")
        rows, columns = self.rows(), self.columns.long()
        inside = torch.ones_like(rows, dtype=torch.bool) if subset is None else subset[rows, columns]
        chosen = _largest(target, int(inside.sum()), metric, subset, self.values.dtype)
        kept = ~inside
        return self.from_entries(
            self.shape,
            torch.cat([rows[kept], chosen.rows()]),
            torch.cat([columns[kept], chosen.columns.long()]),
            torch.cat([self.values[kept], chosen.values]),
        )

    def continuous(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        values = continuous["values"].float()
        place = (self.rows(), self.columns.long())
        return values.new_zeros(self.shape).index_put(place, values)

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> SparseOutliers:
        return replace(self, values=stored_like(self, continuous)["values"])

    def spec(self) -> dict[str, Any]:
        name = str(self.values.dtype).removeprefix("torch.")
        return {"kind": self.kind, "shape": list(self.shape), "entries": self.values.numel(), "dtype": name}

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values, "columns": self.columns, "offsets": self.offsets}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape, dtype, entries = shape_from_spec(spec), dtype_from_spec(spec, VALUE_DTYPES), spec.get("entries")
        if type(entries) is not int or not 0 <= entries <= shape[0] * shape[1]:
            raise CheckpointError(f"sparse part of shape {list(shape)}: 'entries' must be a count, not {entries!r}.")
        return {
            "values": ((entries,), dtype),
            "columns": ((entries,), torch.int32),
            "offsets": ((shape[0] + 1,), torch.int32),
        }

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> SparseOutliers:
        found = checked_buffers(cls, spec, state)
        return cls(shape_from_spec(spec)[1], found["values"], found["columns"], found["offsets"])

    def check(self) -> None:
        """Raise CheckpointError for offsets or columns that do not ascend, or values that are not finite."""
        where = f"sparse part of shape {list(self.shape)}"
        offsets, n = self.offsets.long(), self.values.numel()
        if int(offsets[0]) != 0 or int(offsets[-1]) != n or bool((offsets[1:] < offsets[:-1]).any()):
            raise CheckpointError(f"{where}: row offsets do not rise from 0 to the {n} entries.")
        columns = self.columns.long()
        if n and (int(columns.min()) < 0 or int(columns.max()) >= self.in_features):
            raise CheckpointError(f"{where}: columns range from {int(columns.min())} to {int(columns.max())}.")
        flat = self.rows() * self.in_features + columns
        if bool((flat[1:] <= flat[:-1]).any()):
            raise CheckpointError(f"{where}: columns within a row are not ascending, or a position is given twice.")
        if not bool(torch.isfinite(self.values).all()):
            raise CheckpointError(f"{where}: values have NaN or infinity.")


def _largest(
    target: Tensor, count: int, metric: Metric | None, subset: Tensor | None, dtype: torch.dtype
) -> SparseOutliers:
    shape = (int(target.shape[0]), int(target.shape[1]))
    if not bool(torch.isfinite(target).all()):
        raise NumericsError(f"the matrix of shape {list(shape)} to take outliers from has NaN or infinite values.")
    score = target.abs().float() if metric is None else target.abs().float() * metric.entry_weights(shape).sqrt()
    score = score.expand(shape).reshape(-1)
    if subset is not None:
        score = torch.where(subset.reshape(-1), score, -1.0)
    flat = torch.sort(score, descending=True, stable=True).indices[:count]
    values = target.reshape(-1)[flat].to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"an outlier of {float(target.abs().max()):.4g} is beyond {dtype}; use a wider dtype.")
    return SparseOutliers.from_entries(shape, flat // max(1, shape[1]), flat % max(1, shape[1]), values)
