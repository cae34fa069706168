"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known. A row's inputs are split among programs when there are too few tiles to fill the device, as at
batch 1; the parts are then added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.packing import LANES
from trimtab.kernels.triton_device import absent, interpreted, packed_tiles, refused

__all__ = ["absent", "grid_matmul_triton", "refuses"]


def refuses(x: Tensor, weights: Sequence[GridWeight]) -> str | None:
    """Why these arguments need another backend, or None."""
    for weight in weights:
        if reason := refused({"x": x, **weight.tensors()}, ("x", "scales")):
            return reason
        if weight.packed.data_ptr() % 2:
            return "packed does not begin at an even address"
    return None


def grid_matmul_triton(x: Tensor, weights: Sequence[GridWeight]) -> tuple[Tensor, ...]:
    """`grid_matmul_many` in Triton, one launch for each weight, for input that `refuses` has no objection to."""
    rows = x.numel() // weights[0].in_features
    inputs = x.float() if interpreted() else x  # the interpreter's matrix product reads bfloat16 as integers
    inputs = inputs.contiguous()
    shape = x.shape[:-1]
    return tuple(_product(inputs, rows, weight).to(x.dtype).reshape(*shape, weight.out_features) for weight in weights)


def _product(inputs: Tensor, rows: int, weight: GridWeight) -> Tensor:
    """float32 [rows, out] of contiguous inputs."""
    from trimtab.kernels.grid_matmul.triton_program import grid_matmul_program

    in_features, out_features, groups = weight.in_features, weight.out_features, weight.scales.shape[1]
    if not rows or not out_features:
        return inputs.new_empty((rows, out_features), dtype=torch.float32)
    zeros, levels, group = weight.zeros, weight.levels, in_features // groups
    cut = packed_tiles(rows, out_features, in_features, weight.bits, inputs.device)
    partial = torch.empty((cut.splits, rows, out_features), dtype=torch.float32, device=inputs.device)
    grid_matmul_program[cut.grid](
        inputs,
        weight.packed.view(torch.int16),
        weight.scales,
        weight.scales if zeros is None else zeros,
        weight.scales if levels is None else levels,
        partial,
        rows,
        out_features,
        in_features,
        weight.packed.shape[1] // 2,
        groups,
        group,
        0 if levels is None or levels.ndim == 1 else 2**weight.bits,
        cut.blocks,
        cut.tail_lanes,
        cut.per_split,
        HAS_ZEROS=zeros is not None,
        HAS_LEVELS=levels is not None,
        WHOLE_CHUNKS=groups == 1 or group % LANES == 0,
        WIDE=zeros is not None and zeros.dtype != torch.uint8,
        num_warps=4,
        **cut.constants,
    )
    return partial.sum(dim=0)
