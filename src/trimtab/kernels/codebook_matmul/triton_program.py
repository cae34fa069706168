"""The Triton program of codebook_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codebook_matmul_program(
    x,
    codes,
    codebooks,
    scales,
    out,
    batch,
    out_features,
    groups,
    entries,
    in_features,
    BOOKS: tl.constexpr,
    G: tl.constexpr,
    USE_DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[batch, out], float32, from x float32; each of BLOCK_K inputs finds its number of its code's vector."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    batches = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_ok = rows < out_features
    batch_ok = batches < batch
    sums = tl.zeros([BLOCK_B, BLOCK_O], dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        ok = inputs < in_features
        mask = row_ok[:, None] & ok[None, :]
        weights = tl.zeros([BLOCK_O, BLOCK_K], dtype=tl.float32)
        places = (rows[:, None] * groups + (inputs // G)[None, :]) * BOOKS
        for m in tl.static_range(BOOKS):
            code = tl.load(codes + places + m, mask=mask, other=0).to(tl.int32) & (entries - 1)
            at = (m * entries + code) * G + (inputs % G)[None, :]
            weights += tl.load(codebooks + at, mask=mask, other=0.0).to(tl.float32)
        at = batches[:, None] * in_features + inputs[None, :]
        values = tl.load(x + at, mask=batch_ok[:, None] & ok[None, :], other=0.0)
        if USE_DOT:
            sums += tl.dot(values, tl.trans(weights), input_precision="ieee")
        else:
            sums += tl.sum(values[:, None, :] * weights[None, :, :], axis=2)
    scale = tl.load(scales + rows, mask=row_ok, other=0.0).to(tl.float32)
    place = batches[:, None] * out_features + rows[None, :]
    tl.store(out + place, sums * scale[None, :], mask=batch_ok[:, None] & row_ok[None, :])
