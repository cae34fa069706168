"""Some KV heads of a layer, which hold the same tokens: appending, encoding what leaves the window, forgetting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention import Lane
from trimtab.models.segments.pivots import pivot_tokens
from trimtab.models.segments.plan import HeadPlan
from trimtab.models.segments.side import Side, exact_run

Unrotate = Callable[[Tensor, Sequence[int]], Tensor]
"""(rotated keys [R, H, m, d], position of the first token of each row) -> keys before rotary embedding."""


class Group:
    """One entry of a layer's plan, with what it holds.

    first_positions   for each row, the position of its first token in the text; None before there is one
    forgotten         for each row, tokens dropped from the front because a sliding window has passed them
    pivots            for each row, tokens of the prompt that stay exact, ascending
    """

    def __init__(self, plan: HeadPlan, keys: Tensor, values: Tensor) -> None:
        rows, heads = keys.shape[0], len(plan.heads)
        self.plan = plan
        self.keys = Side(plan.keys, rows, keys, heads)
        self.values = Side(plan.values, rows, values, heads)
        self.first_positions: list[int | None] = [None] * rows
        self.forgotten = [0] * rows
        self.pivots: list[Tensor | None] = [None] * rows

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.keys, self.values

    @property
    def rows(self) -> int:
        return self.keys.rows

    def tokens(self, row: int) -> int:
        """Tokens that this row holds."""
        return self.keys.encoded_tokens(row) + self.keys.window_tokens(row)

    def append(self, keys: Tensor, values: Tensor, valid: Sequence[Tensor] | None, first: Sequence[int]) -> None:
        """Add tokens [R, H, T, d]; `first` is the position of each row's first valid token."""
        for row, position in enumerate(first):
            if self.first_positions[row] is None and (valid is None or len(valid[row])):
                self.first_positions[row] = position
        self.keys.append(keys, valid)
        self.values.append(values, valid)

    def note_pivots(self, hidden: Tensor, valid: Sequence[Tensor] | None) -> None:
        """Mark tokens of the prompt by what enters the block, [R, T, c]. The first token is always one."""
        for row in range(self.rows):
            own = hidden[row] if valid is None else hidden[row, valid[row]]
            if len(own):
                found = pivot_tokens(own, self.plan.pivots)
                self.pivots[row] = torch.unique(torch.cat([found.new_zeros(1), found]))

    def lane(self, row: int) -> Lane:
        """What a query sees of this row."""
        in_cache = self.plan.positions == "cache"
        window_position = self.keys.encoded_tokens(row) if in_cache else None
        return Lane(row, self.plan.heads, self.keys.lane_runs(row, window_position), self.values.lane_runs(row, None))

    def settle(self, *, prefill: bool, unrotate: Unrotate | None, sliding_window: int | None) -> None:
        """Encode what has left the windows; forget what nothing will attend to again."""
        if self.plan.recent is not None:
            self._evict(self.plan.recent)
            return
        self._encode(self.keys, prefill, unrotate if self.plan.keys.pre_rope else None)
        self._encode(self.values, prefill, None)
        if sliding_window is not None:
            for row in range(self.rows):
                self._forget(row, self.tokens(row) - sliding_window)

    def _evict(self, recent: int) -> None:
        """Keep the sinks and the latest tokens."""
        for side in self.sides:
            for row in range(self.rows):
                if self.plan.sinks and not side.runs[row] and side.window_tokens(row) >= self.plan.sinks:
                    self._keep_sinks(side, row)
                surplus = side.window_tokens(row) - recent
                if side.runs[row] or not self.plan.sinks:
                    side.drop(row, max(0, surplus))
            side.shrink()

    def _keep_sinks(self, side: Side, row: int) -> None:
        x = side.take([row], self.plan.sinks)[0]
        in_cache = side is self.keys and self.plan.positions == "cache"
        side.runs[row].append(exact_run(x, 0 if in_cache else None))

    def _encode(self, side: Side, prefill: bool, unrotate: Unrotate | None) -> None:
        waiting: dict[int, list[int]] = {}
        for row in range(self.rows):
            count = side.window_tokens(row) - side.plan.window
            if self.plan.sinks and not side.runs[row]:
                count -= self.plan.sinks
                if count >= side.plan.block:
                    self._keep_sinks(side, row)
            if count >= side.plan.block:
                waiting.setdefault(count - count % side.plan.block, []).append(row)
        for count, rows in waiting.items():
            begins = [side.encoded_tokens(row) + self.forgotten[row] for row in rows]
            x = side.take(rows, count)
            positions = [(self.first_positions[row] or 0) + begin for row, begin in zip(rows, begins, strict=True)]
            raw = x if unrotate is None else unrotate(x, positions)
            pivots = [self._pivots_in(row, begin, count) for row, begin in zip(rows, begins, strict=True)]
            runs = side.plan.codec.encode(
                raw,
                first_position=None if unrotate is None else positions,
                prefill=prefill,
                override_tokens=pivots,
                override_values=[None if own is None else x[index][:, own] for index, own in enumerate(pivots)],
            )
            for row, run in zip(rows, runs, strict=True):
                side.runs[row].append(run)
        if waiting:
            side.shrink()

    def _pivots_in(self, row: int, begin: int, count: int) -> Tensor | None:
        """Pivots among `count` tokens from index `begin` on, counted from there; None if there are none."""
        pivots = self.pivots[row]
        if pivots is None:
            return None
        own = pivots[(pivots >= begin) & (pivots < begin + count)] - begin
        return own if own.numel() else None

    def _forget(self, row: int, before: int) -> None:
        """Drop whole runs of tokens below index `before`, of keys and values alike."""
        ends = [set(), set()]  # type: list[set[int]]
        for side, found in zip(self.sides, ends, strict=True):
            end = 0
            for run in side.runs[row]:
                end += run.tokens
                found.add(end)
        common = max((end for end in ends[0] & ends[1] if end <= before), default=0)
        for side in self.sides:
            left = common
            while left:
                left -= side.runs[row].pop(0).tokens
        self.forgotten[row] += common

    def select(self, rows: Sequence[int]) -> Group:
        """A group whose row i is this one's rows[i]."""
        other = Group.__new__(Group)
        other.plan = self.plan
        other.keys, other.values = self.keys.select(rows), self.values.select(rows)
        other.first_positions = [self.first_positions[row] for row in rows]
        other.forgotten = [self.forgotten[row] for row in rows]
        other.pivots = [self.pivots[row] for row in rows]
        return other

    def crop(self, row: int, count: int) -> bool:
        """Remove the last `count` tokens if they are exact in keys and values; False, and nothing done, if not."""
        if any(_exact_tail(side, row) < count for side in self.sides):
            return False
        for side in self.sides:
            left = count
            held = min(left, side.window_tokens(row))
            side.cut(row, side.window_tokens(row) - held)
            left -= held
            while left:
                run = side.runs[row].pop()
                if run.tokens > left:
                    assert run.exact is not None
                    side.runs[row].append(exact_run(run.exact[:, : run.tokens - left], run.first_position))
                left -= min(left, run.tokens)
        return True


def _exact_tail(side: Side, row: int) -> int:
    """Tokens at the end of a row that can be taken back: those of the window, and of exact runs before it."""
    count = side.window_tokens(row)
    for run in reversed(side.runs[row]):
        if run.exact is None:
            break
        count += run.tokens
    return count


def rows_of(valid: Tensor | None) -> list[Tensor] | None:
    """A mask [R, T] of tokens that are no padding, as indices for each row; None if all are valid."""
    if valid is None or bool(valid.all()):
        return None
    return [torch.nonzero(row)[:, 0] for row in valid]
