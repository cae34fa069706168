"""The Triton program of gather_matmul. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_matmul_program(
    x,
    columns,
    scale,
    partial,
    threshold,
    rows,
    in_features,
    out_features,
    blocks_per_split,
    HAS_SCALE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, rows, out], float32, of one row of x float32: a column that does not count is masked, not read."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    output_ok = outputs < out_features
    limit = tl.load(threshold)
    sums = tl.zeros([BLOCK_O], dtype=tl.float32)
    for block in range(blocks_per_split):
        inputs = (split * blocks_per_split + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        input_ok = inputs < in_features
        numbers = tl.load(x + row * in_features + inputs, mask=input_ok, other=0.0)
        magnitudes = tl.abs(numbers)
        if HAS_SCALE:
            magnitudes *= tl.load(scale + inputs, mask=input_ok, other=0.0)
        # NaN counts, so that it shows
        counts = input_ok & ((magnitudes > limit) | (magnitudes != magnitudes))
        at = inputs[:, None] * out_features + outputs[None, :]
        weights = tl.load(columns + at, mask=counts[:, None] & output_ok[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(weights * tl.where(counts, numbers, 0.0)[:, None], axis=0)
    tl.store(partial + (split * rows + row) * out_features + outputs, sums, mask=output_ok)
