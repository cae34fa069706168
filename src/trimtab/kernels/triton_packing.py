"""In Triton: packed codes out of the layout of packing.py. Imported only where Triton is."""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_at(w0, w1, w2, K: tl.constexpr, BITS: tl.constexpr):
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
def load_words(row_start, at, lanes, mask, width, PLANES: tl.constexpr):
    """The words of `lanes` of a block that begins at word `at`, int32; w1 and w2 are w0 unless it has three planes.

    width   lanes of the block, so words of a plane
    """
    pointers = row_start + at + lanes[None, :]
    w0 = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    w1 = w0
    w2 = w0
    if PLANES == 3:
        w1 = tl.load(pointers + width, mask=mask, other=0).to(tl.int32)
        w2 = tl.load(pointers + 2 * width, mask=mask, other=0).to(tl.int32)
    return w0, w1, w2
