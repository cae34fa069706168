"""The keys, or the values, of some heads of a layer: encoded runs, then a window of exact tokens, for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention import Run
from trimtab.models.segments.plan import TensorPlan

_MOVE_EVERY = 64
"""Tokens after which a window that loses one at each step is moved to the front of its buffer, at the earliest."""


class Side:
    """One tensor of one group of heads. Rows are independent; runs are shared freely, the buffer is owned.

    runs      for each row, the encoded tokens, oldest first; change them with `push` and `pop` only
    encoded   for each row, how many tokens its runs hold
    starts    for each row, where its window begins in the buffer
    ends      and where it ends
    usual     tokens of room that are enough between encodings
    """

    def __init__(self, plan: TensorPlan, rows: int, like: Tensor, heads: int, window: int) -> None:
        self.plan = plan
        self.runs: list[list[Run]] = [[] for _ in range(rows)]
        self.encoded = [0] * rows
        self.starts = [0] * rows
        self.ends = [0] * rows
        self.usual = window + (plan.block if plan.block >= _MOVE_EVERY // 2 else _MOVE_EVERY)
        self.buffer = _empty(like, rows, heads, 0)

    @property
    def rows(self) -> int:
        return len(self.starts)

    def window(self, row: int) -> Tensor:
        """[H, tokens, d], a view."""
        return self.buffer[row, :, self.starts[row] : self.ends[row]]

    def window_tokens(self, row: int) -> int:
        return self.ends[row] - self.starts[row]

    def push(self, row: int, run: Run) -> None:
        """Add a run to the end of a row's runs."""
        self.runs[row].append(run)
        self.encoded[row] += run.tokens

    def pop(self, row: int, index: int = -1) -> Run:
        """Take a row's last run away, or its first with index 0."""
        run = self.runs[row].pop(index)
        self.encoded[row] -= run.tokens
        return run

    def append(self, x: Tensor, valid: Sequence[list[int]] | None) -> None:
        """x [R, H, T, d] to the end of each row's window; `valid`: for each row, indices of the tokens, no padding."""
        length = x.shape[2]
        self._make_room(length)
        end = self.ends[0]
        if valid is None and self.ends.count(end) == len(self.ends):
            self.buffer[:, :, end : end + length] = x
            self.ends = [end + length] * len(self.ends)
            return
        for row in range(self.rows):
            own = x[row] if valid is None else x[row][:, valid[row]]
            end = self.ends[row]
            self.buffer[row, :, end : end + own.shape[1]] = own
            self.ends[row] = end + own.shape[1]

    def _make_room(self, length: int) -> None:
        """Room for `length` more tokens in each row: windows move to the front, into a larger buffer if need be."""
        room = self.buffer.shape[2]
        if max(self.ends) + length <= room:
            return
        needed = length + max(map(self.window_tokens, range(self.rows)))
        if needed > room:
            self._move(_empty(self.buffer, self.rows, self.buffer.shape[1], max(needed, self.usual)))
        else:
            self._move(self.buffer)

    def _move(self, target: Tensor) -> None:
        """Put the windows at the front of `target`, which may be the buffer itself."""
        for row in range(self.rows):
            window = self.window(row)
            count = window.shape[1]
            if target is not self.buffer or self.starts[row]:
                target[row, :, :count] = window.clone() if target is self.buffer else window
            self.starts[row], self.ends[row] = 0, count
        self.buffer = target

    def drop(self, row: int, count: int) -> None:
        """Forget the oldest tokens of a window."""
        self.starts[row] += count

    def cut(self, row: int, tokens: int) -> None:
        """Forget all but the first `tokens` of a window."""
        self.ends[row] = self.starts[row] + tokens

    def keep(self, row: int, mark: int, chosen: Sequence[int]) -> None:
        """Of a window's tokens from index `mark` on, keep those with the indices `chosen`, counted from `mark`."""
        base = self.starts[row] + mark
        if list(chosen) != list(range(len(chosen))):
            index = torch.tensor(chosen, dtype=torch.long, device=self.buffer.device)
            self.buffer[row, :, base : base + len(chosen)] = self.buffer[row, :, base + index]
        self.ends[row] = base + len(chosen)

    def shrink(self) -> None:
        """Give back the room of a long prompt."""
        if self.buffer.shape[2] > self.usual * 5 // 4 and max(map(self.window_tokens, range(self.rows))) <= self.usual:
            self._move(_empty(self.buffer, self.rows, self.buffer.shape[1], self.usual))

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
        other = Side.__new__(Side)
        other.plan, other.usual = self.plan, self.usual
        other.runs = [list(self.runs[row]) for row in rows]
        other.encoded = [self.encoded[row] for row in rows]
        other.starts = [self.starts[row] for row in rows]
        other.ends = [self.ends[row] for row in rows]
        other.buffer = _empty(self.buffer, len(rows), *self.buffer.shape[1:3])
        for row, source in enumerate(rows):
            other.window(row).copy_(self.window(source))
        return other

    def lane_runs(self, row: int, window_position: int | None) -> tuple[Run, ...]:
        """All runs of a row, the window as the last of them."""
        tokens = self.ends[row] - self.starts[row]
        if not tokens:
            return tuple(self.runs[row])
        heads, dim = self.buffer.shape[1], self.buffer.shape[3]
        run = Run(tokens=tokens, heads=heads, head_dim=dim, exact=self.window(row), first_position=window_position)
        return (*self.runs[row], run)

    def tensors(self) -> list[Tensor]:
        """All tensors held, shared ones as often as they are referred to."""
        return [self.buffer, *(t for runs in self.runs for run in runs for t in run.tensors().values())]


def exact_run(x: Tensor, first_position: int | None = None) -> Run:
    """An exact run that owns a copy of x [H, m, d]."""
    return Run(
        tokens=x.shape[1],
        heads=x.shape[0],
        head_dim=x.shape[2],
        exact=x.clone(memory_format=torch.contiguous_format),
        first_position=first_position,
    )


def _empty(like: Tensor, rows: int, heads: int, tokens: int) -> Tensor:
    """A buffer that can be written to whatever mode the caller is in, inference mode included."""
    with torch.inference_mode(False):
        return torch.empty((rows, heads, tokens, like.shape[-1]), dtype=like.dtype, device=like.device)
