"""One layer of a SegmentCache: what transformers asks of a cache layer, and attention over what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from trimtab.core.errors import CompositionError, DataError
from trimtab.kernels.kv_attention import Rope, kv_attention
from trimtab.models.segments.dense import attention_over_dense, dense_lane, exact_attention, pad_columns
from trimtab.models.segments.group import Group, rows_of
from trimtab.models.segments.plan import HeadPlan
from trimtab.models.segments.rope import RopeSource, rotated, unrotated

if TYPE_CHECKING:
    from trimtab.models.segments.cache import SegmentCache

MAX_QUERIES = 64
"""Queries up to which attention runs on the compressed tokens; more are a prompt, for which they are decoded once."""


class SegmentLayer(CacheLayerMixin):
    """The keys and values of one attention layer.

    A step has two halves, because only the attention function knows masks and positions: `update`, which the model
    calls, keeps the new tokens aside; `attend`, which the attention backend calls, appends them, attends and encodes
    what has left the window. Under another attention implementation `update` does all of it and returns dense tensors.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SegmentCache, index: int, plan: tuple[HeadPlan, ...], rope: RopeSource | None) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.plan = plan
        self.rope = rope
        self.groups: list[Group] = []
        self.length = 0
        self.pending: tuple[Tensor, Tensor] | None = None
        self.marks: list[list[tuple[int, int]]] | None = None
        self.marked_length = 0
        self.noted: Tensor | None = None

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.groups = [Group(plan, key_states, value_states) for plan in self.plan]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.rows:
            raise DataError(
                f"the cache holds {self.rows} rows, the new tokens are {key_states.shape[0]}. Use a cache per batch, or "
                "reorder it."
            )
        if self.cache.has_backend():
            self.pending = key_states, value_states
            # a detached alias, so that the mark is on this call's tensor alone
            keys = key_states.view_as(key_states)
            keys.trimtab_layer = self  # type: ignore[attr-defined]
            return keys, value_states
        self._append(key_states, value_states, None, None)
        dense = [self._dense(row) for row in range(self.rows)]
        self._settle(prefill=key_states.shape[2] > 1)
        return torch.stack([k for k, _ in dense]), torch.stack([v for _, v in dense])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.groups, self.length, self.is_initialized, self.pending, self.marks = [], 0, False, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(self.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(torch.arange(self.rows)[indices.cpu()].tolist())

    @property
    def is_croppable(self) -> bool:
        return all(_is_exact(plan) for plan in self.plan)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |tokens_to_remove| tokens. Raises CompositionError if some of them are encoded already."""
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        for group in self.groups:
            for row in range(self.rows):
                if not group.crop(row, min(count, group.tokens(row))):
                    raise CompositionError(
                        f"layer {self.index}: the last {count} tokens cannot be removed, some are encoded already. Use "
                        "cache.begin() before drafting and cache.rollback() or cache.commit() after it."
                    )
        self.length -= count

    # What the attention backend calls.

    @property
    def rows(self) -> int:
        return self.groups[0].rows if self.groups else 0

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Append the pending tokens and attend to all: query [R, Hq, T, d] -> [R, Hq, T, d]."""
        assert self.pending is not None, "attend follows update"
        keys, values = self.pending
        self.pending = None
        length = keys.shape[2]
        fresh = self.length == 0
        valid = None if mask is None else rows_of(_valid_tokens(mask, length))
        bias = self.cache.key_bias.get(self.index)
        position_ids = self._positions(position_ids, length) if self.cache.rope_positions else None
        query_in_cache = self._append(keys, values, valid, position_ids, query)
        if fresh and length > 1:
            out = exact_attention(query, keys, values, mask, scaling, softcap, sliding_window, bias)
        else:
            out = self._over_lanes(query_in_cache, valid, mask, scaling, softcap, sliding_window, bias)
        if self.marks is None:
            self._settle(prefill=fresh and length > 1, sliding_window=sliding_window)
        return out

    def note_inputs(self, hidden: Tensor) -> None:
        """Mark the pivots of the prompt that is about to come; of later tokens none is one."""
        if self.length == 0:
            self.noted = hidden

    def _positions(self, position_ids: Tensor | None, length: int) -> Tensor:
        """[R, T]; transformers leaves them out where the family has no use for them."""
        if position_ids is None:
            position_ids = torch.arange(self.length, self.length + length, device=self.device)[None]
        return position_ids.expand(self.rows, -1)

    def _append(
        self,
        keys: Tensor,
        values: Tensor,
        valid: list[Tensor] | None,
        positions: Tensor | None,
        query: Tensor | None = None,
    ) -> Tensor:
        """Add tokens to all groups; returns the query, rotated to its index in the cache for groups that want that."""
        length = keys.shape[2]
        self.cache.check_length(self.length + length)
        if positions is None and self.rope is not None:
            positions = self._positions(None, length)
        first = [self.length] * self.rows if positions is None else _first_positions(positions, valid)
        angles = None
        for group in self.groups:
            own = list(group.plan.heads)
            whole = len(own) == keys.shape[1]
            k = keys if whole else keys[:, own]
            v = values if whole else values[:, own]
            if group.plan.positions == "cache":
                assert positions is not None and self.rope is not None
                angles = angles or self.rope.angles(positions)
                at = Rope(angles.cos[:, None], angles.sin[:, None])
                k = unrotated(k, at)
                if query is not None:
                    query = self._rotated_in_cache(query, group, at, valid)
            if group.plan.pivots and self.noted is not None:
                group.note_pivots(self.noted, valid)
            group.append(k, v, valid, first)
        self.noted = None
        self.length += length
        return query if query is not None else keys

    def _rotated_in_cache(self, query: Tensor, group: Group, at: Rope, valid: list[Tensor] | None) -> Tensor:
        """Queries of a group moved from their positions in the text to their indices in the cache."""
        assert self.rope is not None
        length, rows = query.shape[2], range(self.rows)
        positions = torch.zeros((self.rows, length), dtype=torch.long, device=query.device)
        for row in rows:
            held = group.tokens(row)
            if valid is None:
                positions[row] = torch.arange(held, held + length)
            else:
                positions[row, valid[row]] = torch.arange(held, held + len(valid[row]), device=query.device)
        angles = self.rope.angles(positions)
        per_head = query.shape[1] // sum(len(plan.heads) for plan in self.plan)
        heads = [head * per_head + i for head in group.plan.heads for i in range(per_head)]
        moved = rotated(unrotated(query[:, heads], at), Rope(angles.cos[:, None], angles.sin[:, None]))
        return moved if len(heads) == query.shape[1] else query.index_copy(1, torch.tensor(heads), moved)

    def _over_lanes(
        self,
        query: Tensor,
        valid: list[Tensor] | None,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
        bias: Tensor | None,
    ) -> Tensor:
        length = query.shape[2]
        lanes = [group.lane(row) for group in self.groups for row in range(self.rows)]
        tail = None if length == 1 and self.marks is None else self._tail(length, valid, mask)
        first = None if sliding_window is None else self._first_visible(length, valid, sliding_window)
        if bias is not None:
            bias = pad_columns(bias, max(lane.tokens for lane in lanes))
        rope = None
        if self.rope is not None:
            rope = self.rope.table(max((_last_position(lane.keys) for lane in lanes), default=0), query.device)
        options: dict[str, Any] = {
            "scale": scaling,
            "rope": rope,
            "softcap": softcap,
            "bias": bias,
            "first_visible": first,
            "tail_visible": tail,
        }
        if length > MAX_QUERIES:
            return attention_over_dense(query, lanes, **options)
        return kv_attention(query, lanes, **options)[0]

    def _tail(self, length: int, valid: list[Tensor] | None, mask: Tensor | None) -> Tensor:
        """bool [R, T, S]: which of the last S tokens, those of the draft and the new ones, each query sees."""
        drafted = 0 if self.marks is None else self.length - length - self.marked_length
        span = drafted + length
        if mask is None:
            shown = torch.ones((1, length, span), dtype=torch.bool, device=self.device).tril(drafted)
            return shown.expand(self.rows, -1, -1)
        shown = mask[:, 0, :, -span:]
        shown = (shown if shown.dtype == torch.bool else shown == 0).expand(self.rows, -1, -1)
        if valid is None:
            return shown
        aligned = torch.zeros_like(shown)
        for row, tokens in enumerate(valid):
            columns = torch.cat([torch.arange(drafted, device=tokens.device), tokens + drafted])
            aligned[row][:, span - len(columns) :] = shown[row][:, columns]
        return aligned

    def _first_visible(self, length: int, valid: list[Tensor] | None, window: int) -> Tensor:
        """int64 [R, T]: the first key in each lane that is within the sliding window of each query."""
        group = self.groups[0]
        found = torch.zeros((self.rows, length), dtype=torch.long, device=self.device)
        for row in range(self.rows):
            held = group.tokens(row)
            if valid is None:
                found[row] = torch.arange(held - length, held, device=self.device) - window + 1
            else:
                count = len(valid[row])
                found[row, valid[row]] = torch.arange(held - count, held, device=self.device) - window + 1
        return found.clamp_(min=0)

    def _settle(self, *, prefill: bool, sliding_window: int | None = None) -> None:
        for group in self.groups:
            group.settle(prefill=prefill, unrotate=self._unrotate, sliding_window=sliding_window)

    def _unrotate(self, keys: Tensor, first: Sequence[int]) -> Tensor:
        assert self.rope is not None
        steps = torch.arange(keys.shape[2], device=keys.device)
        angles = self.rope.angles(torch.tensor(list(first), device=keys.device)[:, None] + steps)
        return unrotated(keys.float(), Rope(angles.cos[:, None], angles.sin[:, None]))

    def _dense(self, row: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a row, [Hk, n, d], as attention sees them."""
        lanes = [group.lane(row) for group in self.groups]
        if len({lane.tokens for lane in lanes}) > 1 or any(g.plan.positions == "cache" for g in self.groups):
            raise CompositionError(
                "heads of this cache hold different tokens, which dense tensors cannot show. Let the model use the "
                "attention implementation 'trimtab', as method.new(model) sets it."
            )
        rope = None
        if self.rope is not None:
            rope = self.rope.table(max(_last_position(lane.keys) for lane in lanes), self.device)
        return dense_lane(lanes, rope, self.dtype)

    # Transactions.

    def begin(self) -> None:
        self.marks = [[(g.keys.window_tokens(r), g.values.window_tokens(r)) for r in range(g.rows)] for g in self.groups]
        self.marked_length = self.length

    def finish(self, chosen: Sequence[Tensor] | None, *, prefill: bool) -> None:
        """Keep the chosen drafted tokens of each row (None: all) and encode what has left the window."""
        assert self.marks is not None
        if chosen is not None:
            for group, marks in zip(self.groups, self.marks, strict=True):
                for row, (in_keys, in_values) in enumerate(marks):
                    group.keys.keep(row, in_keys, chosen[row])
                    group.values.keep(row, in_values, chosen[row])
                    if not len(chosen[row]) and not group.tokens(row):
                        group.first_positions[row] = None
            self.length = self.marked_length + max((len(c) for c in chosen), default=0)
        self.marks = None
        self._settle(prefill=prefill)

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row rows[i] was."""
        self.groups = [group.select(rows) for group in self.groups]

    def copy_for(self, cache: SegmentCache) -> SegmentLayer:
        """The same layer for another cache: runs are shared, windows are copied."""
        other = SegmentLayer(cache, self.index, self.plan, self.rope)
        other.length, other.is_initialized = self.length, self.is_initialized
        if self.is_initialized:
            other.dtype, other.device = self.dtype, self.device
            other.groups = [group.select(range(group.rows)) for group in self.groups]
        return other


def _is_exact(plan: HeadPlan) -> bool:
    return plan.recent is None and all(getattr(p.codec, "bits", 1) == 0 for p in (plan.keys, plan.values))


def _valid_tokens(mask: Tensor, length: int) -> Tensor:
    """bool [R, T]: a token sees itself unless it is padding. mask [R, 1, T, n], bool or additive."""
    own = mask[:, 0, :, -length:].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own == 0


def _first_positions(positions: Tensor, valid: list[Tensor] | None) -> list[int]:
    """The position of each row's first valid token."""
    if valid is None:
        return [int(p) for p in positions[:, 0]]
    return [int(positions[row, own[0]]) if len(own) else 0 for row, own in enumerate(valid)]


def _last_position(keys: Sequence[Any]) -> int:
    return max((run.first_position + run.tokens for run in keys if run.first_position is not None), default=0)
