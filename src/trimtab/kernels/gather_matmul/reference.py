"""Plain PyTorch: what gather_matmul computes, by a mask on the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def counts(x: Tensor, threshold: float, scale: Tensor | None = None) -> Tensor:
    """Which inputs count, bool [..., in]: |x| * scale > threshold in float32, and NaN."""
    magnitude = x.float().abs()
    return ~((magnitude if scale is None else magnitude * scale) <= threshold)


def gather_matmul_reference(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """x [..., in], columns [in, out]: products and sums in float32, results in x.dtype."""
    large = counts(x, threshold, scale)
    out = torch.where(large, x, 0).float() @ columns.float()
    if left is not None and right is not None:
        rest = torch.where(large, 0, x).float()
        out = out + torch.nn.functional.linear(torch.nn.functional.linear(rest, right.float()), left.float())
    return out.to(x.dtype)
