"""The Triton program of grid_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(w0, w1, w2, K: tl.constexpr, BITS: tl.constexpr):
    """Code K of each lane, int32, from the lane's words (w1 and w2 only for 3 bits)."""
    if BITS == 3:
        if K == 15:
            codes = ((w0 >> 15) & 1) | (((w1 >> 15) & 1) << 1) | (((w2 >> 15) & 1) << 2)
        elif K < 5:
            codes = (w0 >> (3 * K)) & 7
        elif K < 10:
            codes = (w1 >> (3 * (K - 5))) & 7
        else:
            codes = (w2 >> (3 * (K - 10))) & 7
    else:
        codes = (w0 >> (BITS * K)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def _load_words(row_start, at, lanes, mask, width, PLANES: tl.constexpr):
    pointers = row_start + at + lanes[None, :]
    w0 = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    w1 = w0
    w2 = w0
    if PLANES == 3:
        w1 = tl.load(pointers + width, mask=mask, other=0).to(tl.int32)
        w2 = tl.load(pointers + 2 * width, mask=mask, other=0).to(tl.int32)
    return w0, w1, w2


@triton.jit
def _product(x, w, USE_DOT: tl.constexpr):
    """x [batch, 32] times w [out, 32], summed over the 32, float32 [batch, out]."""
    if USE_DOT:
        product = tl.dot(x, tl.trans(w), input_precision="ieee")
    else:
        product = tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
    return product


@triton.jit
def _numbers(
    codes, levels, zeros, zeros_at, mask, BITS: tl.constexpr, HAS_LEVELS: tl.constexpr, HAS_ZEROS: tl.constexpr
):
    """What the scales multiply, float32 [out, 32]: levels of codes int32 [out, 32], or codes less zero points."""
    if HAS_LEVELS:
        numbers = tl.load(levels + codes, mask=mask, other=0.0)
    else:
        if HAS_ZEROS:
            numbers = codes.to(tl.float32) - tl.load(zeros + zeros_at, mask=mask, other=0).to(tl.float32)
        else:
            numbers = codes.to(tl.float32) - (1 << (BITS - 1))
    return numbers


@triton.jit
def grid_matmul_program(
    x,
    packed,
    scales,
    zeros,
    levels,
    partial,
    batch,
    out_features,
    in_features,
    words_per_row,
    groups,
    group_size,
    level_step,
    blocks,
    tail_lanes,
    blocks_per_split,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
    WHOLE_CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    USE_DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """partial[split, batch, out], float32: the products of one range of blocks of each row.

    WHOLE_CHUNKS says that a group holds whole chunks of 32 weights: then code - zero, or the level, is multiplied in
    the dtype of x and the scale follows on the chunk's sum. Else weights are scaled one by one. WIDE says that the
    product is of float32: zero points with a fraction need it, for code - zero may not fit the dtype of x.
    """
    LANES: tl.constexpr = 32
    split = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    batches = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    lanes = tl.arange(0, LANES)
    row_ok = rows < out_features
    batch_ok = batches < batch
    row_start = packed + rows[:, None] * words_per_row
    x_start = x + batches[:, None] * in_features
    group_start = rows * groups
    levels_start = levels + rows[:, None] * level_step
    sums = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)

    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        w0, w1, w2 = _load_words(row_start, block * LANES * PLANES, lanes, row_ok[:, None], LANES, PLANES)
        for k in tl.static_range(CODES):
            codes = _codes(w0, w1, w2, k, BITS)
            inputs = block * (LANES * CODES) + k * LANES + lanes
            values = tl.load(x_start + inputs[None, :], mask=batch_ok[:, None], other=0.0)
            if WHOLE_CHUNKS:
                at = group_start + (block * (LANES * CODES) + k * LANES) // group_size
                scale = tl.load(scales + at, mask=row_ok, other=0.0).to(tl.float32)
                w = _numbers(codes, levels_start, zeros, at[:, None], row_ok[:, None], BITS, HAS_LEVELS, HAS_ZEROS)
                if WIDE:
                    values = values.to(tl.float32)
                sums += _product(values, w.to(values.dtype), USE_DOT) * scale[None, :]
            else:
                at = group_start[:, None] + (inputs // group_size)[None, :]
                w = _numbers(codes, levels_start, zeros, at, row_ok[:, None], BITS, HAS_LEVELS, HAS_ZEROS)
                w *= tl.load(scales + at, mask=row_ok[:, None], other=0.0).to(tl.float32)
                sums += _product(values.to(tl.float32), w, USE_DOT)

    # The last, narrower block, by the first split: its chunks have `tail_lanes` weights, which may cross groups.
    if (tail_lanes > 0) & (split == 0):
        lane_ok = lanes < tail_lanes
        mask = row_ok[:, None] & lane_ok[None, :]
        start = tl.cast(blocks, tl.int64) * LANES
        w0, w1, w2 = _load_words(row_start, start * PLANES, lanes, mask, tail_lanes, PLANES)
        for k in tl.static_range(CODES):
            codes = _codes(w0, w1, w2, k, BITS)
            inputs = start * CODES + k * tail_lanes + lanes
            ok = lane_ok & (inputs < in_features)
            values = tl.load(x_start + inputs[None, :], mask=batch_ok[:, None] & ok[None, :], other=0.0)
            at = group_start[:, None] + (inputs // group_size)[None, :]
            mask = row_ok[:, None] & ok[None, :]
            w = _numbers(codes, levels_start, zeros, at, mask, BITS, HAS_LEVELS, HAS_ZEROS)
            w *= tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
            sums += _product(values.to(tl.float32), w, USE_DOT)

    place = (split * batch + batches[:, None]) * out_features + rows[None, :]
    tl.store(partial + place, sums, mask=batch_ok[:, None] & row_ok[None, :])
