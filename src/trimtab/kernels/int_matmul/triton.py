"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known. Inputs are rounded by PyTorch, products and sums are the kernel's. A row's inputs are split among
programs when there are too few tiles to fill the device; sums of the parts are whole numbers, so their order is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.int_matmul.reference import check_index, round_inputs
from trimtab.kernels.triton_device import absent, packed_tiles, refused

__all__ = ["absent", "int_matmul_triton", "refuses"]


def refuses(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = {"x": x, "packed": packed, "weight_scales": weight_scales, "index": index, "row_sums": row_sums}
    if packed.data_ptr() % 2:
        return "packed does not begin at an even address"
    return refused(tensors, ("x", "weight_scales"), strided=tensors.keys() - {"packed"})


def int_matmul_triton(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """`int_matmul` in Triton, for input that `refuses` has no objection to."""
    out_features, width = packed.shape[0], x.shape[-1]
    rows = x.numel() // width
    if not rows or not out_features:
        return x.new_empty((*x.shape[:-1], out_features))
    q, scale, zero = round_inputs(x.reshape(rows, width), x_bits=x_bits, x_scale=x_scale, x_symmetric=x_symmetric)
    middle = 0 if x_symmetric else 2 ** (x_bits - 1)
    inputs = (q - middle).to(torch.int8)
    if index is not None:
        check_index(index, width)
        inputs = inputs[:, index]
    if not x_symmetric and row_sums is None:
        ones = torch.ones(1, in_features, dtype=torch.int8, device=x.device)
        row_sums = _whole_products(ones, packed, bits, in_features)[0]
    total = _whole_products(inputs.contiguous(), packed, bits, in_features)
    exact = total if row_sums is None else total.double() - (zero.double() - middle) * row_sums
    return (exact.float() * weight_scales.float() * scale).to(x.dtype).reshape(*x.shape[:-1], out_features)


def _whole_products(inputs: Tensor, packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inputs int8 [rows, in] times the whole weights, int32 [rows, out]."""
    from trimtab.kernels.int_matmul.triton_program import int_matmul_program

    rows, out_features = inputs.shape[0], packed.shape[0]
    cut = packed_tiles(rows, out_features, in_features, bits, inputs.device)
    partial = torch.empty((cut.splits, rows, out_features), dtype=torch.int32, device=inputs.device)
    int_matmul_program[cut.grid](
        inputs,
        packed.view(torch.int16),
        partial,
        rows,
        out_features,
        in_features,
        packed.shape[1] // 2,
        cut.blocks,
        cut.tail_lanes,
        cut.per_split,
        num_warps=4,
        **cut.constants,
    )
    return partial.sum(dim=0, dtype=torch.int32)
