"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known. A row's inputs are split among programs when there are too few tiles to fill the device, as at
batch 1; the parts are then added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.packing import LANES, codes_per_lane, words_per_lane

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_SPLITS = 16


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if not _interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 interprets Triton kernels, slowly, on the CPU)"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    return None


def refuses(x: Tensor, weights: Sequence[GridWeight]) -> str | None:
    """Why these arguments need another backend, or None."""
    wanted = "cpu" if _interpreted() else "cuda"
    if x.device.type != wanted:
        return f"x is on {x.device}; Triton kernels want it on a {wanted} device"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}; Triton kernels take float32, float16 and bfloat16"
    wants_gradient = x.requires_grad
    for weight in weights:
        for name, tensor in weight.tensors().items():
            if tensor.device != x.device:
                return f"{name} is on {tensor.device} and x on {x.device}; Triton kernels want both on one device"
            if not tensor.is_contiguous():
                return f"{name} of shape {list(tensor.shape)} is not contiguous"
            wants_gradient = wants_gradient or tensor.requires_grad
        if weight.scales.dtype not in _DTYPES:
            return f"scales are {weight.scales.dtype}; Triton kernels take float32, float16 and bfloat16"
        if weight.packed.data_ptr() % 2:
            return "packed does not begin at an even address"
    if wants_gradient and torch.is_grad_enabled():
        return "a gradient is wanted, which only the reference has"
    return None


def grid_matmul_triton(x: Tensor, weights: Sequence[GridWeight]) -> tuple[Tensor, ...]:
    """`grid_matmul_many` in Triton, one launch for each weight, for input that `refuses` has no objection to."""
    rows = x.numel() // weights[0].in_features
    inputs = x.float() if _interpreted() else x  # the interpreter's matrix product reads bfloat16 as integers
    inputs = inputs.contiguous()
    shape = x.shape[:-1]
    return tuple(_product(inputs, rows, weight).to(x.dtype).reshape(*shape, weight.out_features) for weight in weights)


def _product(inputs: Tensor, rows: int, weight: GridWeight) -> Tensor:
    """float32 [rows, out] of contiguous inputs."""
    from trimtab.kernels.grid_matmul.triton_program import grid_matmul_program

    bits, in_features, out_features, groups = (
        weight.bits,
        weight.in_features,
        weight.out_features,
        weight.scales.shape[1],
    )
    if not rows or not out_features:
        return inputs.new_empty((rows, out_features), dtype=torch.float32)
    zeros, levels, group = weight.zeros, weight.levels, in_features // groups
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
    partial = torch.empty((splits, rows, out_features), dtype=torch.float32, device=inputs.device)
    grid_matmul_program[(-(-out_features // block_o), -(-rows // block_b), splits)](
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
        0 if levels is None or levels.ndim == 1 else 2**bits,
        blocks,
        -(-rest // codes),
        per_split,
        BITS=bits,
        CODES=codes,
        PLANES=words_per_lane(bits),
        HAS_ZEROS=zeros is not None,
        HAS_LEVELS=levels is not None,
        WHOLE_CHUNKS=groups == 1 or group % LANES == 0,
        WIDE=zeros is not None and zeros.dtype != torch.uint8,
        USE_DOT=use_dot,
        BLOCK_B=block_b,
        BLOCK_O=block_o,
        num_warps=4,
    )
    return partial.sum(dim=0)


def _wanted_programs(device: torch.device) -> int:
    """Programs that keep a device busy: four per multiprocessor."""
    if device.type != "cuda":
        return 8  # interpreted: few, but more than one split
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
