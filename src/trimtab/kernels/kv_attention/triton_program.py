"""The Triton programs of kv_attention: attention of each item, then their sum. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.kv_attention.triton_tables import ITEM_FIELDS, LANE_FIELDS, RUN_FIELDS
from trimtab.kernels.kv_attention.triton_tiles import decode_block

_RUN_LENGTH = tl.constexpr(len(RUN_FIELDS))
_ITEM_LENGTH = tl.constexpr(len(ITEM_FIELDS))
_LANE_LENGTH = tl.constexpr(len(LANE_FIELDS))
_LANE = tl.constexpr(ITEM_FIELDS.index("lane"))
_KEY_RUN = tl.constexpr(ITEM_FIELDS.index("key_run"))
_KEY_START = tl.constexpr(ITEM_FIELDS.index("key_start"))
_VALUE_RUN = tl.constexpr(ITEM_FIELDS.index("value_run"))
_VALUE_START = tl.constexpr(ITEM_FIELDS.index("value_start"))
_FIRST = tl.constexpr(ITEM_FIELDS.index("first"))
_TOKENS = tl.constexpr(ITEM_FIELDS.index("tokens"))
_ROW = tl.constexpr(LANE_FIELDS.index("row"))
_LANE_TOKENS = tl.constexpr(LANE_FIELDS.index("tokens"))
_FIRST_ITEM = tl.constexpr(LANE_FIELDS.index("first_item"))
_END_ITEM = tl.constexpr(LANE_FIELDS.index("end_item"))

_ITEMS_AT_ONCE = tl.constexpr(16)


@triton.jit(do_not_specialize=["first_order", "bias_columns", "tail_columns"])
def attend_program(
    query,
    runs,
    items,
    lanes,
    order,
    first_order,
    cos,
    sin,
    half,
    bias,
    bias_columns,
    first_visible,
    tail_visible,
    tail_columns,
    sums,
    statistics,
    scale,
    softcap,
    query_heads,
    length,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
):
    """One item, one KV head: sums [items, HEADS, QUERIES, DIM] of exp(score - maximum) * value, and statistics
    [items, HEADS, QUERIES, 2], the maximum and the sum of these weights; all float32.

    QUERIES = query heads of a KV head times their `length`; Q: padded to a power of two. HEADS: most heads of a lane.
    KEY, VALUE: a `Format` each. DOT: name of the dtype in which keys, values and weights are multiplied.
    """
    item_number = tl.load(order + first_order + tl.program_id(0))
    item = items + item_number * _ITEM_LENGTH
    lane = lanes + tl.load(item + _LANE) * (_LANE_LENGTH + HEADS)
    head = tl.program_id(1).to(tl.int64)
    kv_head = tl.load(lane + _LANE_LENGTH + head)
    if kv_head < 0:
        return
    row = tl.load(lane + _ROW)
    lane_tokens = tl.load(lane + _LANE_TOKENS)
    first = tl.load(item + _FIRST)
    tokens = tl.load(item + _TOKENS)
    key_run = runs + tl.load(item + _KEY_RUN) * _RUN_LENGTH
    key_start = tl.load(item + _KEY_START)
    value_run = runs + tl.load(item + _VALUE_RUN) * _RUN_LENGTH
    value_start = tl.load(item + _VALUE_START)

    queries = tl.arange(0, Q)
    channels = tl.arange(0, D)
    steps = tl.arange(0, 32 * TILES)
    is_query = queries < QUERIES
    if DOT == "float16":
        dtype: tl.constexpr = tl.float16
    elif DOT == "bfloat16":
        dtype: tl.constexpr = tl.bfloat16
    else:
        dtype: tl.constexpr = tl.float32
    query_head = row * query_heads + kv_head * (QUERIES // length) + queries // length
    of_row = row * length + queries % length
    at = (row * query_heads * length + kv_head * QUERIES + queries)[:, None] * DIM + channels[None, :]
    q = tl.load(query + at, mask=is_query[:, None] & (channels < DIM)[None, :], other=0.0).to(dtype)
    if HAS_FIRST:
        begin = tl.load(first_visible + of_row, mask=is_query, other=0)
    maximum = tl.full([Q], -float("inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    weighted = tl.zeros([Q, D], tl.float32)

    for done in range(0, tokens, 32 * TILES):
        keys = decode_block(key_run, head, key_start + done, cos, sin, half, DIM, D, TILES, KEY)
        scores = tl.dot(q, keys.to(dtype), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # tanh
        token = first + done + steps  # in the lane
        live = done + steps < tokens
        visible = is_query[:, None] & live[None, :]
        if HAS_BIAS:
            scores += tl.load(bias + query_head[:, None] * bias_columns + token[None, :], mask=visible, other=0.0)
        if HAS_FIRST:
            visible &= token[None, :] >= begin[:, None]
        if HAS_TAIL:
            column = token - lane_tokens + tail_columns
            shown = tl.load(
                tail_visible + of_row[:, None] * tail_columns + column[None, :],
                mask=visible & (column >= 0)[None, :],
                other=1,
            )
            visible &= shown != 0
        scores = tl.where(visible, scores, -float("inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(maximum - finite)
        values = decode_block(value_run, head, value_start + done, cos, sin, half, DIM, D, TILES, VALUE)
        product = tl.dot(weights.to(dtype), tl.trans(values).to(dtype), input_precision="ieee")
        weighted = weighted * shrink[:, None] + product
        total = total * shrink + tl.sum(weights, axis=1)
        maximum = highest

    place = (item_number * HEADS + head) * QUERIES + queries
    tl.store(
        sums + place[:, None] * DIM + channels[None, :], weighted, mask=is_query[:, None] & (channels < DIM)[None, :]
    )
    tl.store(statistics + place * 2, maximum, mask=is_query)
    tl.store(statistics + place * 2 + 1, total, mask=is_query)


@triton.jit
def merge_program(
    sums,
    statistics,
    lanes,
    out,
    lse,
    query_heads,
    length,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
):
    """One lane, head and query: the sums of its items on a common maximum, divided by the sum of their weights."""
    lane = lanes + tl.program_id(0).to(tl.int64) * (_LANE_LENGTH + HEADS)
    head = tl.program_id(1).to(tl.int64)
    query = tl.program_id(2).to(tl.int64)
    kv_head = tl.load(lane + _LANE_LENGTH + head)
    if kv_head < 0:
        return
    end = tl.load(lane + _END_ITEM)
    channels = tl.arange(0, D)
    maximum = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([D], tl.float32)
    for first in range(tl.load(lane + _FIRST_ITEM), end, _ITEMS_AT_ONCE):
        item = first + tl.arange(0, _ITEMS_AT_ONCE)
        live = item < end
        place = (item * HEADS + head) * QUERIES + query
        own = tl.load(statistics + place * 2, mask=live, other=-float("inf"))
        highest = tl.maximum(maximum, tl.max(own, axis=0))
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp(own - finite)
        shrink = tl.exp(maximum - finite)
        parts = tl.load(
            sums + place[:, None] * DIM + channels[None, :], mask=live[:, None] & (channels < DIM)[None, :], other=0.0
        )
        weighted = weighted * shrink + tl.sum(parts * weights[:, None], axis=0)
        own_total = tl.load(statistics + place * 2 + 1, mask=live, other=0.0)
        total = total * shrink + tl.sum(own_total * weights, axis=0)
        maximum = highest
    place = (tl.load(lane + _ROW) * query_heads * length + kv_head * QUERIES) + query
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out + place * DIM + channels, weighted / safe, mask=channels < DIM)
    tl.store(lse + place + tl.arange(0, 1), maximum + tl.log(safe))
