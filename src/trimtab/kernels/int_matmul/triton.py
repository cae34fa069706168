"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known. Inputs are rounded by PyTorch, products and sums are the kernel's. A row's inputs are split among
programs when there are too few tiles to fill the device; sums of the parts are whole numbers, so their order is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.grid_matmul.triton import _interpreted, _wanted_programs, absent
from trimtab.kernels.int_matmul.reference import check_index, round_inputs
from trimtab.kernels.packing import LANES, codes_per_lane, words_per_lane

__all__ = ["absent", "int_matmul_triton", "refuses"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_SPLITS = 16


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
    wanted = "cpu" if _interpreted() else "cuda"
    tensors = {"x": x, "packed": packed, "weight_scales": weight_scales, "index": index, "row_sums": row_sums}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != wanted or tensor.device != x.device:
            return f"{name} is on {tensor.device} and x on {x.device}; Triton kernels want both on one {wanted} device"
    if not packed.is_contiguous() or packed.data_ptr() % 2:
        return f"packed of shape {list(packed.shape)} is not contiguous, or does not begin at an even address"
    if x.dtype not in _DTYPES or weight_scales.dtype not in _DTYPES:
        return (
            f"x is {x.dtype} and weight_scales are {weight_scales.dtype}; "
            "Triton kernels take float32, float16 and bfloat16"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight_scales.requires_grad):
        return "a gradient is wanted, which only the reference has"
    return None


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
    codes = codes_per_lane(bits)
    blocks, rest = divmod(in_features, LANES * codes)
    # A matrix product needs tiles of at least 16 rows; below that the programs multiply and add, two rows each.
    use_dot = rows >= 8
    block_b = (16 if rows <= 16 else 32) if use_dot else (1 if rows == 1 else 2)
    block_o = 64 if use_dot else 32
    tiles = -(-out_features // block_o) * -(-rows // block_b)
    splits = max(1, min(_MAX_SPLITS, blocks, _wanted_programs(inputs.device) // tiles))
    per_split = max(1, -(-blocks // splits))
    splits = max(1, -(-blocks // per_split))
    partial = torch.empty((splits, rows, out_features), dtype=torch.int32, device=inputs.device)
    int_matmul_program[(-(-out_features // block_o), -(-rows // block_b), splits)](
        inputs,
        packed.view(torch.int16),
        partial,
        rows,
        out_features,
        in_features,
        packed.shape[1] // 2,
        blocks,
        -(-rest // codes),
        per_split,
        BITS=bits,
        CODES=codes,
        PLANES=words_per_lane(bits),
        USE_DOT=use_dot,
        BLOCK_B=block_b,
        BLOCK_O=block_o,
        num_warps=4,
    )
    return partial.sum(dim=0, dtype=torch.int32)
