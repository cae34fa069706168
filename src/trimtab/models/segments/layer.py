"""One layer of a SegmentCache: what transformers asks of a cache layer, and attention over what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from trimtab.core.errors import CompositionError, DataError
from trimtab.kernels.kv_attention import Rope
from trimtab.models.segments.attending import attend_to_all, query_heads
from trimtab.models.segments.dense import dense_lane, exact_attention
from trimtab.models.segments.draft import Draft
from trimtab.models.segments.group import Group
from trimtab.models.segments.in_cache import in_order, places
from trimtab.models.segments.plan import HeadPlan
from trimtab.models.segments.rope import RopeSource, rotated, unrotated
from trimtab.models.segments.visibility import token_columns

if TYPE_CHECKING:
    from trimtab.models.segments.cache import SegmentCache


class SegmentLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys and values of one attention layer.

    A step has two halves, because only the attention function knows masks and positions: `update`, which the model
    calls, keeps the new tokens aside; `attend`, which the attention backend calls, appends them, attends and encodes
    what has left the window. Under another attention implementation `update` does all of it and returns dense tensors;
    padding is then kept like tokens, because masks do not reach the cache.

    length        tokens so far as masks count them, padding included
    lengths       for each row, its tokens so far, also those that are forgotten
    first         for each row, the position of its first token, where keys are kept before rotary embedding
    draft         what `begin()` has noted, None outside of a transaction
    record_past   transformers wants to take tokens back: nothing is forgotten meanwhile
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SegmentCache, index: int, plan: tuple[HeadPlan, ...], rope: RopeSource | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.index = index
        self.plan = plan
        self.rope = rope
        self.record_past = False
        self.sliding_window: int | None = None
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.groups: list[Group] = []
        self.length = 0
        self.lengths: list[int] = []
        self.first: list[int | None] = []
        self.draft: Draft | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.noted: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.groups = [Group(plan, key_states, value_states) for plan in self.plan]
        self.lengths, self.first = [0] * rows, [None] * rows
        self.is_initialized = True
        if self.draft is not None:
            self.begin()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.rows:
            raise DataError(
                f"the cache holds {self.rows} rows, the new tokens are {key_states.shape[0]}. Use a cache for each "
                "batch, or reorder it."
            )
        if self.cache.has_backend():
            self.pending = key_states, value_states
            # an alias, so that the mark is on this call's tensor alone
            keys = key_states.view_as(key_states)
            keys.trimtab_layer = self  # type: ignore[attr-defined]
            return keys, value_states
        self._check_dense()
        fresh = self.length == 0
        self._append(key_states, value_states, None, None, None)
        dense = [self._dense(row) for row in range(self.rows)]
        self._settle(prefill=fresh and key_states.shape[2] > 1, sliding_window=None)
        return torch.stack([k for k, _ in dense]), torch.stack([v for _, v in dense])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(self.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(torch.arange(self.rows)[indices.cpu()].tolist())

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return all(_is_exact(plan) for plan in self.plan)

    def check_crop(self, count: int) -> None:
        """Raise CompositionError if the last `count` tokens cannot be taken back."""
        if self.draft is not None:
            raise CompositionError("a draft is open; commit or roll it back instead of crop().")
        for group in self.groups:
            for row, length in enumerate(self.lengths):
                if not group.can_crop(row, min(count, length), length, self.sliding_window):
                    raise CompositionError(
                        f"layer {self.index}: the last {count} tokens cannot be removed: some are encoded, or tokens "
                        "before them are forgotten. Use cache.begin() before drafting and cache.rollback() or "
                        "cache.commit() after it."
                    )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |tokens_to_remove| tokens of each row; none of them may be padding, except on the left.

        Raises CompositionError, and changes nothing, if some cannot be taken back.
        """
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        self.check_crop(count)
        for row, length in enumerate(self.lengths):
            for group in self.groups:
                group.crop(row, min(count, length))
            self._set_length(row, max(0, length - count))
        self.length = max(0, self.length - count)

    # What the attention backend calls.

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
        self.sliding_window = sliding_window
        if mask is not None and mask.shape[-1] != self.length + length:
            raise DataError(
                f"the attention mask has {mask.shape[-1]} columns; {self.length} tokens of the cache and {length} new "
                "ones need one each."
            )
        valid = None if mask is None else token_columns(mask, length, self.rows)
        moved = self._append(keys, values, valid, position_ids, query)
        bias = self.cache.key_bias.get(self.index)
        if fresh and length > 1 and bias is None:
            out = exact_attention(query, keys, values, mask, scaling, softcap, sliding_window)
        else:
            out = attend_to_all(self, moved, valid, mask, scaling, softcap, sliding_window, bias)
        if self.draft is None:
            # a bias counts from the oldest key held, which must then stay
            forget = None if bias is not None or self.record_past else sliding_window
            self._settle(prefill=fresh and length > 1, sliding_window=forget)
        return out

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys, rotated, and values [R, Hk, T, d] that were computed elsewhere; nothing attends to them now."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        fresh = self.length == 0
        self._append(keys, values, None, None, None)
        self._settle(prefill=fresh and keys.shape[2] > 1, sliding_window=None)

    def note_inputs(self, hidden: Tensor) -> None:
        """Mark the pivots of the prompt that is about to come; of later tokens none is one."""
        if self.length == 0:
            self.noted = hidden

    def _append(
        self,
        keys: Tensor,
        values: Tensor,
        valid: list[list[int]] | None,
        position_ids: Tensor | None,
        query: Tensor | None,
    ) -> Tensor:
        """Add tokens to all groups; returns the query, rotated to its index in the cache for groups that want that."""
        length = keys.shape[2]
        counts = [length] * self.rows if valid is None else [len(own) for own in valid]
        if self.draft is None:  # of a draft that branches, only the path that is kept counts
            self.cache.check_length(max(map(int.__add__, self.lengths, counts)))
        at = None
        if self.rope is not None:
            if position_ids is None:
                position_ids = torch.arange(self.length, self.length + length, device=self.device)[None]
            position_ids = position_ids.expand(self.rows, -1)
            self._note_positions(position_ids, valid)
            if any(group.in_cache for group in self.groups):
                at = self._angles(position_ids)
        keys, values = keys.detach(), values.detach()
        for group in self.groups:
            own = list(group.plan.heads)
            k, v = (keys, values) if len(own) == keys.shape[1] else (keys[:, own], values[:, own])
            if group.in_cache:
                assert at is not None
                assert position_ids is not None
                k = unrotated(k, self._angles(in_order(position_ids, self._next_positions(), valid)))
                query = None if query is None else self._moved_into_cache(query, group, at, position_ids)
            if group.plan.pivots and self.noted is not None:
                group.note_pivots(self.noted, valid)
            group.append(k, v, valid)
        if self.draft is not None:
            begin = self.length - self.draft.length
            for row, columns in enumerate(self.draft.columns):
                columns += [begin + column for column in (range(length) if valid is None else valid[row])]
        self.noted = None
        self.length += length
        self.lengths = [held + new for held, new in zip(self.lengths, counts, strict=True)]
        return keys if query is None else query

    def _note_positions(self, positions: Tensor, valid: list[list[int]] | None) -> None:
        """Check that positions [R, T] go on from those before: a key's position is that of the first plus its index.

        Those of a draft may branch; `finish` checks the path that is kept.
        """
        found: list[list[int]] = positions.tolist()
        if valid is not None:
            found = [[own[i] for i in columns] for own, columns in zip(found, valid, strict=True)]
        for row, own in enumerate(found):
            if self.draft is None:
                self._check_chain(row, own, self.lengths[row])
            else:
                self.draft.positions[row] += own
            if own and self.first[row] is None:
                self.first[row] = own[0]

    def _check_chain(self, row: int, own: Sequence[int], length: int) -> None:
        """Raise DataError unless these positions follow the row's `length` tokens, each the one before plus one."""
        first = self.first[row]
        if not own:
            return
        expected = own[0] if first is None or not length else first + length
        if list(own) != list(range(expected, expected + len(own))):
            wrong = next(i for i, position in enumerate(own) if position != expected + i)
            raise DataError(
                f"row {row}: position {own[wrong]} comes where {expected + wrong} should. This cache keeps keys before "
                "rotary embedding, for which positions must follow each other, padding not counted. Give position_ids, "
                "as generate() does for an attention_mask, and feed each row as one text."
            )

    def _angles(self, positions: Tensor) -> Rope:
        """Angles for tokens [R, H, T, d] at positions [R, T]."""
        assert self.rope is not None
        angles = self.rope.angles(positions)
        return Rope(angles.cos[:, None], angles.sin[:, None])

    def _moved_into_cache(self, query: Tensor, group: Group, at: Rope, positions: Tensor) -> Tensor:
        """Queries of a group moved from their positions in the text to those in the cache."""
        heads = query_heads(self.plan, group.plan, query.shape[1])
        gone = [begin - group.tokens(row) for row, begin in enumerate(self._next_positions())]
        moved = rotated(unrotated(query[:, heads], at), self._angles(places(positions, gone)))
        if len(heads) == query.shape[1]:
            return moved
        return query.index_copy(1, torch.tensor(heads, device=query.device), moved)

    def _next_positions(self) -> list[int]:
        """Of each row: the position of the token that comes next, if tokens follow each other."""
        return [(first or 0) + length for first, length in zip(self.first, self.lengths, strict=True)]

    def _rope_table(self) -> Rope | None:
        """Angles for all keys that are held before rotary embedding."""
        if self.rope is None:
            return None
        length = 0
        for group in self.groups:
            if group.in_cache:
                length = max(length, *map(group.tokens, range(self.rows)))
            elif group.plan.keys.pre_rope:
                length = max(length, *((at or 0) + count for at, count in zip(self.first, self.lengths, strict=True)))
        return self.rope.table(length, self.device) if length else None

    def _settle(self, *, prefill: bool, sliding_window: int | None) -> None:
        if self.draft is None:
            for group in self.groups:
                group.settle(self.first, prefill=prefill, unrotate=self._unrotate, sliding_window=sliding_window)

    def _unrotate(self, keys: Tensor, first: Sequence[int]) -> Tensor:
        steps = torch.arange(keys.shape[2], device=keys.device)
        return unrotated(keys.float(), self._angles(torch.tensor(list(first), device=keys.device)[:, None] + steps))

    def _check_dense(self) -> None:
        if any(group.plan.recent is not None for group in self.groups):
            raise CompositionError(
                "heads of this cache hold different tokens, which dense tensors cannot show. Let the model use the "
                "attention implementation 'trimtab', as method.new(model) sets it."
            )
        held = {group.tokens(row) for group in self.groups for row in range(self.rows)}
        if held != {self.length}:
            raise CompositionError(
                f"rows of this cache hold {min(held)} to {max(held)} of {self.length} tokens, without padding and what "
                "sliding windows have passed, which dense tensors cannot show. Set the attention implementation back "
                "to 'trimtab'."
            )

    def _dense(self, row: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a row, [Hk, n, d], as attention sees them."""
        return dense_lane([group.lane(row, group.plan.heads) for group in self.groups], self._rope_table(), self.dtype)

    # Transactions.

    def begin(self) -> None:
        windows = [
            [(group.keys.window_tokens(row), group.values.window_tokens(row)) for row in range(self.rows)]
            for group in self.groups
        ]
        empty: list[list[list[int]]] = [[[] for _ in range(self.rows)] for _ in range(2)]
        self.draft = Draft(self.length, list(self.lengths), windows, *empty)

    def finish(self, paths: Sequence[Sequence[int]] | None) -> None:
        """Keep the drafted columns of each row's path (None: all) and encode what has left the window."""
        draft = self.draft
        assert draft is not None
        length = self.length if paths is None else draft.length + max(map(len, paths), default=0)
        paths = draft.columns if paths is None else paths
        stored = [draft.stored(path, row) for row, path in enumerate(paths)]
        lengths = [length + len(kept) for length, kept in zip(draft.lengths, stored, strict=True)]
        self.cache.check_length(max(lengths, default=0))
        starts = list(self.first)
        if self.rope is not None:
            positions = [[own[i] for i in kept] for own, kept in zip(draft.positions, stored, strict=True)]
            for row, own in enumerate(positions):
                self._check_chain(row, own, draft.lengths[row])
                if not draft.lengths[row]:
                    starts[row] = own[0] if own else None
        for group, windows in zip(self.groups, draft.windows, strict=True):
            for row, in_window in enumerate(windows):
                group.keep(row, in_window, stored[row], (starts[row] or 0) + draft.lengths[row], self.rope)
        self.first, self.length, self.draft = starts, length, None
        for row, held in enumerate(lengths):
            self._set_length(row, held)
        self._settle(prefill=False, sliding_window=None)

    def _set_length(self, row: int, length: int) -> None:
        self.lengths[row] = length
        if not length:
            self.first[row] = None
            for group in self.groups:
                group.pivots[row] = None

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row rows[i] was."""
        if list(rows) == list(range(self.rows)):
            return
        self.groups = [group.select(rows) for group in self.groups]
        self.lengths = [self.lengths[row] for row in rows]
        self.first = [self.first[row] for row in rows]
        self.draft = None if self.draft is None else self.draft.select(rows)
        bias = self.cache.key_bias.get(self.index)
        if bias is not None:
            self.cache.key_bias[self.index] = bias[list(rows)]

    def copy_for(self, cache: SegmentCache) -> SegmentLayer:
        """The same layer for another cache: runs are shared, windows are copied."""
        other = SegmentLayer(cache, self.index, self.plan, self.rope)
        other.__dict__.update(self.__dict__)
        other.cache, other.pending, other.noted = cache, None, None
        other.lengths, other.first = list(self.lengths), list(self.first)
        other.groups = [group.select(range(group.rows)) for group in self.groups]
        return other


def _is_exact(plan: HeadPlan) -> bool:
    return plan.recent is None and all(getattr(p.codec, "bits", 1) == 0 for p in (plan.keys, plan.values))
