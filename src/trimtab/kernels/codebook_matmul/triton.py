"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.codebook_matmul.native import GROUP_SIZES
from trimtab.kernels.triton_device import absent, refused

__all__ = ["absent", "codebook_matmul_triton", "refuses"]


def refuses(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int) -> str | None:
    """Why these arguments need another backend, or None."""
    if codebooks.shape[2] not in GROUP_SIZES:
        return f"vectors have {codebooks.shape[2]} numbers; this kernel is for {', '.join(map(str, GROUP_SIZES))}"
    return refused({"x": x, "codes": codes, "codebooks": codebooks, "scales": scales}, ("x", "scales"))


def codebook_matmul_triton(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int) -> Tensor:
    """`codebook_matmul` in Triton, for input that `refuses` has no objection to."""
    from trimtab.kernels.codebook_matmul.triton_program import codebook_matmul_program

    (out_features, groups, books), (_, entries, group_size) = codes.shape, codebooks.shape
    rows = x.numel() // in_features
    if not rows or not out_features:
        return x.new_empty((*x.shape[:-1], out_features))
    out = torch.empty((rows, out_features), dtype=torch.float32, device=x.device)
    block_b, block_o = (1, 32) if rows == 1 else (2, 32) if rows < 8 else (16, 32)
    codebook_matmul_program[(-(-out_features // block_o), -(-rows // block_b))](
        x.float().contiguous(),
        codes,
        codebooks,
        scales,
        out,
        rows,
        out_features,
        groups,
        entries,
        in_features,
        BOOKS=books,
        G=group_size,
        USE_DOT=rows >= 8,
        BLOCK_B=block_b,
        BLOCK_O=block_o,
        BLOCK_K=32,
        num_warps=4,
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], out_features)
