"""The Triton program of sparse_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sparse_matmul_program(
    x,
    bitmap,
    values,
    offsets,
    scales,
    out,
    batch,
    out_features,
    in_features,
    words,
    groups,
    group_words,
    CODES: tl.constexpr,
    USE_DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out[batch, out], float32, from x float32. The place of a value is the count of set bits before its own; codes are
    in half bytes, and those of a word begin a new byte."""
    WORD: tl.constexpr = 64
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    batches = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_ok = rows < out_features
    batch_ok = batches < batch
    lanes = tl.arange(0, WORD)
    next_value = tl.load(offsets + rows, mask=row_ok, other=0).to(tl.int64)
    sums = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)
    for word in range(words):
        bits = tl.load(bitmap + rows * words + word, mask=row_ok, other=0)
        kept = ((bits[:, None] >> lanes[None, :]) & 1).to(tl.int32)
        counted = tl.cumsum(kept, axis=1)
        if CODES:
            places = 2 * next_value[:, None] + counted - kept
            pairs = tl.load(values + places // 2, mask=kept == 1, other=0).to(tl.int32)
            codes = ((pairs >> (places % 2 * 4).to(tl.int32)) & 15 ^ 8) - 8
            scale = tl.load(scales + rows * groups + word // group_words, mask=row_ok, other=0.0).to(tl.float32)
            weights = tl.where(kept == 1, codes.to(tl.float32) * scale[:, None], 0.0)
            next_value += (tl.sum(kept, axis=1) + 1) // 2
        else:
            places = next_value[:, None] + counted - kept
            weights = tl.load(values + places, mask=kept == 1, other=0.0).to(tl.float32)
            next_value += tl.sum(kept, axis=1)
        inputs = word * WORD + lanes
        at = batches[:, None] * in_features + inputs[None, :]
        numbers = tl.load(x + at, mask=batch_ok[:, None] & (inputs < in_features)[None, :], other=0.0)
        if USE_DOT:
            sums += tl.dot(numbers, tl.trans(weights), input_precision="ieee")
        else:
            sums += tl.sum(numbers[:, None, :] * weights[None, :, :], axis=2)
    place = batches[:, None] * out_features + rows[None, :]
    tl.store(out + place, sums, mask=batch_ok[:, None] & row_ok[None, :])
