"""Some KV heads of a layer, which hold the same tokens: appending, encoding what leaves the window, forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention import Lane
from trimtab.models.segments.in_cache import straightened
from trimtab.models.segments.pivots import pivot_tokens
from trimtab.models.segments.plan import HeadPlan
from trimtab.models.segments.rope import RopeSource
from trimtab.models.segments.side import Side, exact_run

Unrotate = Callable[[Tensor, Sequence[int]], Tensor]
"""(rotated keys [R, H, m, d], position of the first token of each row) -> keys before rotary embedding."""


class Group:
    """One entry of a layer's plan, with what it holds.

    forgotten   for each row, tokens dropped from the front because a sliding window has passed them
    pivots      for each row, tokens of the prompt that stay exact, ascending
    """

    def __init__(self, plan: HeadPlan, keys: Tensor, values: Tensor) -> None:
        rows, heads, recent = keys.shape[0], len(plan.heads), plan.recent or 0
        self.plan = plan
        self.keys = Side(plan.keys, rows, keys, heads, max(plan.keys.window, recent))
        self.values = Side(plan.values, rows, values, heads, max(plan.values.window, recent))
        self.forgotten = [0] * rows
        self.pivots: list[Tensor | None] = [None] * rows

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.keys, self.values

    @property
    def rows(self) -> int:
        return self.keys.rows

    @property
    def in_cache(self) -> bool:
        """Keys have their index in the cache as position."""
        return self.plan.positions == "cache"

    def tokens(self, row: int) -> int:
        """Tokens that this row holds."""
        return self.keys.encoded[row] + self.keys.window_tokens(row)

    def append(self, keys: Tensor, values: Tensor, valid: Sequence[list[int]] | None) -> None:
        """Add tokens [R, H, T, d]."""
        self.keys.append(keys, valid)
        self.values.append(values, valid)

    def keep(
        self, row: int, held: tuple[int, int], chosen: Sequence[int], position: int, rope: RopeSource | None
    ) -> None:
        """Of a row's draft, which came when its windows held `held` tokens, keep the tokens `chosen`.

        position   of the first token of the draft
        """
        for side, mark in zip(self.sides, held, strict=True):
            side.keep(row, mark, chosen)
        if self.in_cache and list(chosen) != list(range(len(chosen))):
            assert rope is not None
            keys = self.keys.window(row)[:, held[0] :]
            keys.copy_(straightened(keys, chosen, position, rope))

    def note_pivots(self, hidden: Tensor, valid: Sequence[list[int]] | None) -> None:
        """Mark tokens of the prompt by what enters the block, [R, T, c]. The first token is always one."""
        for row in range(self.rows):
            own = hidden[row] if valid is None else hidden[row, valid[row]]
            if len(own):
                found = pivot_tokens(own, self.plan.pivots)
                self.pivots[row] = torch.unique(torch.cat([found.new_zeros(1), found]))

    def lane(self, row: int, heads: tuple[int, ...]) -> Lane:
        """What a query sees of this row."""
        window_position = self.keys.encoded[row] if self.in_cache else None
        return Lane(row, heads, self.keys.lane_runs(row, window_position), self.values.lane_runs(row, None))

    def settle(
        self, first: Sequence[int | None], *, prefill: bool, unrotate: Unrotate, sliding_window: int | None
    ) -> None:
        """Encode what has left the windows; forget what nothing will attend to again.

        first            for each row, the position of the first token of its text
        sliding_window   of the layer; None: nothing is forgotten
        """
        if self.plan.recent is not None:
            self._evict(self.plan.recent)
            return
        if sliding_window is not None:
            for row in range(self.rows):
                self._forget(row, self.tokens(row) - sliding_window)
        self._encode(self.keys, first, prefill, unrotate if self.plan.keys.pre_rope else None)
        self._encode(self.values, first, prefill, None)

    def _evict(self, recent: int) -> None:
        """Keep the sinks and the latest tokens."""
        for side in self.sides:
            for row in range(self.rows):
                if self.plan.sinks and not side.runs[row] and side.window_tokens(row) >= self.plan.sinks:
                    self._keep_sinks(side, row)
                if side.runs[row] or not self.plan.sinks:
                    side.drop(row, max(0, side.window_tokens(row) - recent))
            side.shrink()

    def _keep_sinks(self, side: Side, row: int) -> None:
        x = side.take([row], self.plan.sinks)[0]
        side.push(row, exact_run(x, 0 if side is self.keys and self.in_cache else None))

    def _encode(self, side: Side, first: Sequence[int | None], prefill: bool, unrotate: Unrotate | None) -> None:
        waiting: dict[int, list[int]] = {}
        for row in range(self.rows):
            count = side.window_tokens(row) - side.plan.window
            if self.plan.sinks and not side.runs[row] and not self.forgotten[row]:
                count -= self.plan.sinks
                if count >= side.plan.block:
                    self._keep_sinks(side, row)
            if count >= side.plan.block:
                waiting.setdefault(count - count % side.plan.block, []).append(row)
        for count, rows in waiting.items():
            # what belongs to its block, such as factors, must not depend on how many tokens came at once
            step = count if prefill or getattr(side.plan.codec, "cut_anywhere", True) else side.plan.block
            for _ in range(0, count, step):
                self._encode_block(side, rows, step, first, prefill, unrotate)
        if waiting:
            side.shrink()

    def _encode_block(
        self,
        side: Side,
        rows: Sequence[int],
        count: int,
        first: Sequence[int | None],
        prefill: bool,
        unrotate: Unrotate | None,
    ) -> None:
        """Encode the oldest `count` tokens of these rows' windows."""
        begins = [side.encoded[row] + self.forgotten[row] for row in rows]
        x = side.take(rows, count)
        positions = [(first[row] or 0) + begin for row, begin in zip(rows, begins, strict=True)]
        pivots = [self._pivots_in(row, begin, count) for row, begin in zip(rows, begins, strict=True)]
        runs = side.plan.codec.encode(
            x if unrotate is None else unrotate(x, positions),
            first_position=None if unrotate is None else positions,
            prefill=prefill,
            override_tokens=pivots,
            override_values=[None if own is None else x[index][:, own] for index, own in enumerate(pivots)],
        )
        for row, run in zip(rows, runs, strict=True):
            side.push(row, run)

    def _pivots_in(self, row: int, begin: int, count: int) -> Tensor | None:
        """Pivots among `count` tokens from index `begin` on, counted from there; None if there are none."""
        pivots = self.pivots[row]
        if pivots is None:
            return None
        own = pivots[(pivots >= begin) & (pivots < begin + count)] - begin
        return own if own.numel() else None

    def _forget(self, row: int, before: int) -> None:
        """Drop tokens below index `before`, of keys and values alike: whole runs, or whole blocks not yet encoded.

        What stays is cut into blocks where it would have been cut anyway.
        """
        if before <= 0:
            return
        dropped = max((end for end in _ends(self.keys, row) & _ends(self.values, row) if end <= before), default=0)
        for side in self.sides:
            left = dropped
            while left:
                left -= side.pop(row, 0).tokens
        if not self.keys.runs[row] and not self.values.runs[row]:
            step = math.lcm(self.keys.plan.block, self.values.plan.block)
            surplus = (before - dropped) // step * step
            for side in self.sides:
                side.drop(row, surplus)
            dropped += surplus
        self.forgotten[row] += dropped

    def select(self, rows: Sequence[int]) -> Group:
        """A group whose row i is this one's rows[i]."""
        other = Group.__new__(Group)
        other.plan = self.plan
        other.keys, other.values = self.keys.select(rows), self.values.select(rows)
        other.forgotten = [self.forgotten[row] for row in rows]
        other.pivots = [self.pivots[row] for row in rows]
        return other

    def can_crop(self, row: int, count: int, length: int, sliding_window: int | None) -> bool:
        """The last `count` of the row's `length` tokens are exact; nothing is gone that a shorter text attends to."""
        evicted = length - self.forgotten[row] - self.tokens(row)
        seen_from = 0 if sliding_window is None else max(0, length - count - sliding_window + 1)
        exact = all(_exact_tail(side, row) >= count for side in self.sides)
        return exact and not evicted and self.forgotten[row] <= seen_from

    def crop(self, row: int, count: int) -> None:
        """Remove the last `count` tokens, which `can_crop` has allowed."""
        for side in self.sides:
            held = min(count, side.window_tokens(row))
            side.cut(row, side.window_tokens(row) - held)
            left = count - held
            while left:
                run = side.pop(row)
                if run.tokens > left:
                    assert run.exact is not None
                    side.push(row, exact_run(run.exact[:, : run.tokens - left], run.first_position))
                left -= min(left, run.tokens)


def _ends(side: Side, row: int) -> set[int]:
    """Where the runs of a row end, in tokens from the oldest one held."""
    end, found = 0, set()
    for run in side.runs[row]:
        end += run.tokens
        found.add(end)
    return found


def _exact_tail(side: Side, row: int) -> int:
    """Tokens at the end of a row that can be taken back: those of the window, and of exact runs before it."""
    count = side.window_tokens(row)
    for run in reversed(side.runs[row]):
        if run.exact is None:
            break
        count += run.tokens
    return count
