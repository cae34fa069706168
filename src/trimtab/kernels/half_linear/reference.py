"""Plain PyTorch: what half_linear computes."""

from __future__ import annotations

import torch
from torch import Tensor


def half_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], plus bias: float32 products and sums, rounded to x.dtype."""
    shift = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), shift).to(x.dtype)
