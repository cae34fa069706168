"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.sparse_matmul.weight import SparseWeight
from trimtab.kernels.triton_device import absent, refused

__all__ = ["absent", "refuses", "sparse_matmul_triton"]


def refuses(x: Tensor, weights: Sequence[SparseWeight]) -> str | None:
    """Why these arguments need another backend, or None."""
    for weight in weights:
        floats = ("x",) if weight.scales is not None else ("x", "values")
        if reason := refused({"x": x, **weight.tensors()}, floats):
            return reason
    return None


def sparse_matmul_triton(x: Tensor, weights: Sequence[SparseWeight]) -> tuple[Tensor, ...]:
    """`sparse_matmul_many` in Triton, one launch for each weight, for input that `refuses` has no objection to."""
    inputs, shape = x.float().contiguous(), x.shape[:-1]
    return tuple(_product(inputs, weight).to(x.dtype).reshape(*shape, weight.out_features) for weight in weights)


def _product(inputs: Tensor, weight: SparseWeight) -> Tensor:
    """float32 [rows, out] of contiguous float32 inputs."""
    from trimtab.kernels.sparse_matmul.triton_program import sparse_matmul_program

    out_features, row_words = weight.bitmap.shape
    rows = inputs.numel() // weight.in_features
    out = torch.empty((rows, out_features), dtype=torch.float32, device=inputs.device)
    if not out.numel():
        return out
    block_b, block_o = (1, 8) if rows == 1 else (2, 16) if rows < 8 else (16, 32)
    scales = weight.scales
    sparse_matmul_program[(-(-out_features // block_o), -(-rows // block_b))](
        inputs,
        weight.bitmap,
        weight.values,
        weight.offsets,
        weight.values if scales is None else scales,
        out,
        rows,
        out_features,
        weight.in_features,
        row_words,
        0 if scales is None else scales.shape[1],
        1 if scales is None else weight.group_size // 64,
        CODES=scales is not None,
        USE_DOT=rows >= 8,
        BLOCK_B=block_b,
        BLOCK_O=block_o,
        num_warps=4,
    )
    return out
