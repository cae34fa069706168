"""The keys, or the values, of some heads of a layer: encoded runs, then a window of exact tokens, for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention import Run
from trimtab.models.segments.plan import TensorPlan

_SLACK = 64

class Side:
    """One tensor of one group of heads. Rows are independent; runs are shared freely, the buffer is owned.

    runs      for each row, the encoded tokens, oldest first
    starts    for each row, where its window begins in the buffer
    ends      and where it ends
    """

    def __init__(self, plan: TensorPlan, rows: int, like: Tensor, heads: int) -> None:
        self.plan = plan
        self.runs: list[list[Run]] = [[] for _ in range(rows)]
        self.starts = [0] * rows
        self.ends = [0] * rows
        self.buffer = like.new_empty((rows, heads, 0, like.shape[-1]))

    @property
    def rows(self) -> int:
        return len(self.starts)

    def window(self, row: int) -> Tensor:
        """[H, tokens, d], a view."""
        return self.buffer[row, :, self.starts[row] : self.ends[row]]

    def window_tokens(self, row: int) -> int:
        return self.ends[row] - self.starts[row]

    def encoded_tokens(self, row: int) -> int:
        return sum(run.tokens for run in self.runs[row])

    def append(self, x: Tensor, valid: Sequence[Tensor] | None) -> None:
        """x [R, H, T, d] to the end of each row's window; `valid` holds the indices of the tokens that are no padding."""
        length = x.shape[2]
        self._make_room(length)
        if valid is None and len(set(self.ends)) == 1:
            end = self.ends[0]
            self.buffer[:, :, end : end + length] = x
            self.ends = [end + length] * self.rows
            return
        for row in range(self.rows):
            own = x[row] if valid is None else x[row][:, valid[row]]
            end = self.ends[row]
            self.buffer[row, :, end : end + own.shape[1]] = own
            self.ends[row] = end + own.shape[1]

    def _make_room(self, length: int) -> None:
        """Room for `length` more tokens in each row: windows move to the front, into a larger buffer if need be."""
        if max(self.ends) + length <= self.buffer.shape[2]:
            return
        longest = max(end - start for start, end in zip(self.starts, self.ends, strict=True))
        needed = longest + length
        usual = self.plan.window + self.plan.block + _SLACK
        fits = needed <= self.buffer.shape[2]
        rows, heads, _, dim = self.buffer.shape
        target = self.buffer if fits else self.buffer.new_empty((rows, heads, max(needed, usual), dim))
        for row in range(rows):
            count = self.window_tokens(row)
            if count and (target is not self.buffer or self.starts[row]):
                target[row, :, :count] = self.window(row).clone() if fits else self.window(row)
            self.starts[row], self.ends[row] = 0, count
        self.buffer = target

    def drop(self, row: int, count: int) -> None:
        """Forget the oldest tokens of a window."""
        self.starts[row] += count

    def cut(self, row: int, tokens: int) -> None:
        """Forget all but the first `tokens` of a window."""
        self.ends[row] = self.starts[row] + tokens

    def keep(self, row: int, mark: int, chosen: Tensor) -> None:
        """Of a window's tokens from index `mark` on, keep those with the indices `chosen`, counted from `mark`."""
        base = self.starts[row] + mark
        kept = self.buffer[row, :, base + chosen.to(self.buffer.device)]
        self.buffer[row, :, base : base + kept.shape[1]] = kept
        self.ends[row] = base + kept.shape[1]

    def shrink(self) -> None:
        """Give back the room of a long prompt."""
        usual = self.plan.window + self.plan.block + _SLACK
        if self.buffer.shape[2] > 2 * usual and max(self.window_tokens(r) for r in range(self.rows)) <= usual:
            old = self.buffer
            self.buffer = old.new_empty((*old.shape[:2], usual, old.shape[3]))
            for row in range(self.rows):
                count = self.window_tokens(row)
                self.buffer[row, :, :count] = old[row, :, self.starts[row] : self.ends[row]]
                self.starts[row], self.ends[row] = 0, count

    def take(self, rows: Sequence[int], count: int) -> Tensor:
        """The oldest `count` tokens of these rows' windows, [len(rows), H, count, d], which leave the windows."""
        starts = {self.starts[row] for row in rows}
        if len(starts) == 1 and list(rows) == list(range(self.rows)):
            start = starts.pop()
            x = self.buffer[:, :, start : start + count]
        else:
            x = torch.stack([self.buffer[row, :, self.starts[row] : self.starts[row] + count] for row in rows])
        for row in rows:
            self.drop(row, count)
        return x

    def select(self, rows: Sequence[int]) -> Side:
        """A side whose row i is this one's rows[i]. Runs are shared, the window is copied."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.buffer.device)
        other = Side.__new__(Side)
        other.plan = self.plan
        other.runs = [list(self.runs[row]) for row in rows]
        other.starts = [self.starts[row] for row in rows]
        other.ends = [self.ends[row] for row in rows]
        other.buffer = self.buffer.index_select(0, index)
        return other

    def lane_runs(self, row: int, window_position: int | None) -> tuple[Run, ...]:
        """All runs of a row, the window as the last of them."""
        window = self.window(row)
        if not window.shape[1]:
            return tuple(self.runs[row])
        run = Run(
            tokens=window.shape[1],
            heads=window.shape[0],
            head_dim=window.shape[2],
            exact=window,
            first_position=window_position,
        )
        return (*self.runs[row], run)

    def tensors(self) -> list[Tensor]:
        """All tensors held, shared ones as often as they are referred to."""
        found = [self.buffer]
        for runs in self.runs:
            for run in runs:
                found += run.tensors().values()
        return found


def exact_run(x: Tensor, first_position: int | None = None) -> Run:
    """An exact run that owns a copy of x [H, m, d]."""
    return Run(
        tokens=x.shape[1], heads=x.shape[0], head_dim=x.shape[2], exact=x.contiguous().clone(), first_position=first_position
    )

