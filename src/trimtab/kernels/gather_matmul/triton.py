"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter only: no GPU was at hand, so its tile sizes are reasoned and its
speed is not known. The columns are split among programs where outputs alone are too few to fill the device; the parts
are then added in a fixed order. The low-rank term is two thin products, which torch does well, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.gather_matmul.native import MAX_ROWS
from trimtab.kernels.gather_matmul.reference import counts
from trimtab.kernels.triton_device import absent, refused, wanted_programs

__all__ = ["absent", "gather_matmul_triton", "refuses"]

_BLOCK_O = 128
_BLOCK_K = 32
_MAX_SPLITS = 16


def refuses(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    if x.shape.numel() > MAX_ROWS * columns.shape[0]:
        return f"x of shape {list(x.shape)} has more than {MAX_ROWS} rows"
    return refused({"x": x, "columns": columns, "scale": scale, "left": left, "right": right}, ("x", "columns"))


def gather_matmul_triton(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`gather_matmul` in Triton, for input that `refuses` has no objection to."""
    from trimtab.kernels.gather_matmul.triton_program import gather_matmul_program

    in_features, out_features = columns.shape
    shape = (*x.shape[:-1], out_features)
    if not in_features or 0 in shape:
        return x.new_zeros(shape)
    inputs = x.float().reshape(-1, in_features).contiguous()
    rows, tiles, blocks = inputs.shape[0], -(-out_features // _BLOCK_O), -(-in_features // _BLOCK_K)
    splits = max(1, min(_MAX_SPLITS, blocks, wanted_programs(x.device) // (tiles * rows)))
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)
    partial = torch.empty((splits, rows, out_features), dtype=torch.float32, device=x.device)
    gather_matmul_program[(tiles, rows, splits)](
        inputs,
        columns,
        inputs if scale is None else scale,
        partial,
        torch.tensor([threshold], dtype=torch.float32, device=x.device),
        rows,
        in_features,
        out_features,
        per_split,
        HAS_SCALE=scale is not None,
        BLOCK_O=_BLOCK_O,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
    )
    out = partial.sum(dim=0)
    if left is not None and right is not None:
        rest = torch.where(counts(inputs, threshold, scale), 0, inputs)
        out += torch.nn.functional.linear(torch.nn.functional.linear(rest, right.float()), left.float())
    return out.to(x.dtype).reshape(shape)
