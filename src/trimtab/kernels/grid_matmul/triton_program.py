"""The Triton program of grid_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.triton_packing import codes_at, load_words


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
        w0, w1, w2 = load_words(row_start, block * LANES * PLANES, lanes, row_ok[:, None], LANES, PLANES)
        for k in tl.static_range(CODES):
            codes = codes_at(w0, w1, w2, k, BITS)
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
        w0, w1, w2 = load_words(row_start, start * PLANES, lanes, mask, tail_lanes, PLANES)
        for k in tl.static_range(CODES):
            codes = codes_at(w0, w1, w2, k, BITS)
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
