"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.triton_device import absent, refused

__all__ = ["absent", "refuses", "sparse_matmul_triton"]


def refuses(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> str | None:
    """Why these arguments need another backend, or None."""
    return refused({"x": x, "bitmap": bitmap, "values": values, "offsets": offsets}, ("x", "values"))


def sparse_matmul_triton(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """`sparse_matmul` in Triton, for input that `refuses` has no objection to."""
    from trimtab.kernels.sparse_matmul.triton_program import sparse_matmul_program

    out_features, row_words = bitmap.shape
    rows = x.numel() // in_features
    if not rows or not out_features:
        return x.new_empty((*x.shape[:-1], out_features))
    out = torch.empty((rows, out_features), dtype=torch.float32, device=x.device)
    block_b, block_o = (1, 8) if rows == 1 else (2, 16) if rows < 8 else (16, 32)
    sparse_matmul_program[(-(-out_features // block_o), -(-rows // block_b))](
        x.float().contiguous(),
        bitmap,
        values,
        offsets,
        out,
        rows,
        out_features,
        in_features,
        row_words,
        USE_DOT=rows >= 8,
        BLOCK_B=block_b,
        BLOCK_O=block_o,
        num_warps=4,
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], out_features)
