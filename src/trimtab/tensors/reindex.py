"""Input channels split into equal shares and merged into means, so that no channel is much larger than the others.

`x' = P x` with a sparse P. A row of P is either one share of a split channel, `x_j / T_j`, or the mean of a group of
channels (most groups have one member). The weight that goes with it has the split column T_j times, and the sum of the
columns of a group, `W' = W R`. Without merged groups `W' x' = W x` exactly. Source: QLLM, arXiv:2310.08041.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.transform import Buffers, Transform


@dataclass(frozen=True, eq=False)
class Reindex(Transform):
    """x [..., size] -> x' [..., width].

    size       channels of the input
    columns    int32 [entries]: the channels of each row of P, row after row
    offsets    int32 [width + 1]: row r owns columns[offsets[r] : offsets[r + 1]]
    splits     int16 [width]: T_j for a share of a split channel, 1 for the others

    Raises ConfigError for shapes and dtypes that do not fit.
    """

    kind: ClassVar[str] = "reindex"

    size: int
    columns: Tensor
    offsets: Tensor
    splits: Tensor

    def __post_init__(self) -> None:
        wanted = {"columns": torch.int32, "offsets": torch.int32, "splits": torch.int16}
        wrong = [n for n, dtype in wanted.items() if getattr(self, n).dtype != dtype or getattr(self, n).ndim != 1]
        if wrong or len(self.offsets) != len(self.splits) + 1 or self.size < 1:
            raise ConfigError(
                f"a reindexing of {self.size} channels: columns {self.columns.dtype} {list(self.columns.shape)}, "
                f"offsets {self.offsets.dtype} {list(self.offsets.shape)}, splits {self.splits.dtype} "
                f"{list(self.splits.shape)}; must be int32 [entries], int32 [width + 1], int16 [width]."
            )

    @classmethod
    def of(cls, size: int, rows: list[tuple[list[int], int]]) -> Reindex:
        """From (channels, T) of each row of P; T is 1 unless the row is a share of a split channel."""
        columns = [column for members, _ in rows for column in members]
        lengths = torch.tensor([0] + [len(members) for members, _ in rows])
        return cls(
            size,
            torch.tensor(columns, dtype=torch.int32),
            lengths.cumsum(0).to(torch.int32),
            torch.tensor([parts for _, parts in rows], dtype=torch.int16),
        )

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return int(self.splits.shape[0])

    @functools.cached_property
    def _row_of(self) -> Tensor:
        """Row of P of each entry, int64."""
        lengths = (self.offsets[1:] - self.offsets[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.width, device=lengths.device), lengths)

    @functools.cached_property
    def _weights(self) -> Tensor:
        """Value of the entries of each row of P, float32 [width]."""
        return 1 / ((self.offsets[1:] - self.offsets[:-1]).float() * self.splits.float())

    @functools.cached_property
    def _first(self) -> Tensor:
        return self.columns[self.offsets[:-1].long()].long()

    @functools.cached_property
    def _further(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the entries after the first of their row: few."""
        entries = torch.arange(len(self.columns), device=self.columns.device)
        later = entries != self.offsets[:-1].long()[self._row_of]
        return self._row_of[later], self.columns[later].long()

    def apply(self, x: Tensor) -> Tensor:
        rows, columns = self._further
        total = x[..., self._first].float()
        if len(rows):
            total = total.index_add(-1, rows, x[..., columns].float())
        return (total * self._weights).to(x.dtype)

    def expand(self, weight: Tensor) -> Tensor:
        """W' = W R: weight [out, size] -> [out, width], split columns repeated and those of a group summed."""
        summed = weight.new_zeros(weight.shape[0], self.width)
        return summed.index_add(1, self._row_of, weight[:, self.columns.long()])

    def fold(self, weight: Tensor) -> Tensor:
        """W' P: weight [out, width] -> [out, size]."""
        spread = (weight * self._weights.to(weight))[:, self._row_of]
        return weight.new_zeros(weight.shape[0], self.size).index_add(1, self.columns.long(), spread)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "width": self.width, "entries": int(self.columns.shape[0])}

    def state(self) -> dict[str, Tensor]:
        return {"columns": self.columns, "offsets": self.offsets, "splits": self.splits}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> Buffers:
        counts = [spec.get(name) for name in ("size", "width", "entries")]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CheckpointError(f"no reindexing can be read from {dict(spec)!r}.")
        _, width, entries = counts
        assert isinstance(width, int)
        assert isinstance(entries, int)
        return {
            "columns": ((entries,), torch.int32),
            "offsets": ((width + 1,), torch.int32),
            "splits": ((width,), torch.int16),
        }

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Reindex:
        wanted = cls.buffers(spec)
        found = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        if found != wanted:
            raise CheckpointError(f"reindexing: buffers {found} where {wanted} are wanted.")
        return cls(spec["size"], **state)

    def check(self) -> None:
        offsets, columns = self.offsets.long(), self.columns
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(columns) or bool((offsets[1:] <= offsets[:-1]).any()):
            raise CheckpointError(f"reindexing of {self.size} channels: offsets do not rise from 0 to {len(columns)}.")
        if int(columns.min()) < 0 or int(columns.max()) >= self.size or int(self.splits.min()) < 1:
            raise CheckpointError(
                f"reindexing of {self.size} channels: columns {int(columns.min())} .. {int(columns.max())}, least "
                f"number of shares {int(self.splits.min())}."
            )
