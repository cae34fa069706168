"""The Triton program of int_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.triton_packing import codes_at, load_words


@triton.jit
def _whole_product(x, w, USE_DOT: tl.constexpr):
    """x [batch, 32] times w [out, 32], both int8, summed over the 32, int32 [batch, out]."""
    if USE_DOT:
        product = tl.dot(x, tl.trans(w), out_dtype=tl.int32)
    else:
        product = tl.sum(x.to(tl.int32)[:, None, :] * w.to(tl.int32)[None, :, :], axis=2)
    return product


@triton.jit
def int_matmul_program(
    x,
    packed,
    partial,
    batch,
    out_features,
    in_features,
    words_per_row,
    blocks,
    tail_lanes,
    blocks_per_split,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    PLANES: tl.constexpr,
    USE_DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """partial[split, batch, out], int32: the products of x, int8, and code - 2^(bits-1) of one range of blocks."""
    LANES: tl.constexpr = 32
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    split = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    batches = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    lanes = tl.arange(0, LANES)
    row_ok = rows < out_features
    batch_ok = batches < batch
    row_start = packed + rows[:, None] * words_per_row
    x_start = x + batches[:, None] * in_features
    sums = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.int32)

    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        w0, w1, w2 = load_words(row_start, block * LANES * PLANES, lanes, row_ok[:, None], LANES, PLANES)
        for k in tl.static_range(CODES):
            weights = (codes_at(w0, w1, w2, k, BITS) - MIDDLE).to(tl.int8)
            inputs = block * (LANES * CODES) + k * LANES + lanes
            values = tl.load(x_start + inputs[None, :], mask=batch_ok[:, None], other=0)
            sums += _whole_product(values, weights, USE_DOT)

    # The last, narrower block, by the first split; inputs past the end are zero, whatever the code there.
    if (tail_lanes > 0) & (split == 0):
        lane_ok = lanes < tail_lanes
        start = tl.cast(blocks, tl.int64) * LANES
        mask = row_ok[:, None] & lane_ok[None, :]
        w0, w1, w2 = load_words(row_start, start * PLANES, lanes, mask, tail_lanes, PLANES)
        for k in tl.static_range(CODES):
            weights = (codes_at(w0, w1, w2, k, BITS) - MIDDLE).to(tl.int8)
            inputs = start * CODES + k * tail_lanes + lanes
            ok = lane_ok & (inputs < in_features)
            values = tl.load(x_start + inputs[None, :], mask=batch_ok[:, None] & ok[None, :], other=0)
            sums += _whole_product(values, weights, USE_DOT)

    place = (split * batch + batches[:, None]) * out_features + rows[None, :]
    tl.store(partial + place, sums, mask=batch_ok[:, None] & row_ok[None, :])
