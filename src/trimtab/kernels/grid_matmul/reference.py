"""Plain PyTorch: what grid_matmul computes."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.packing import unpack


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, in_features: int
) -> Tensor:
    """The dense float32 weight [out, in]: `scale * (code - zero)` of each weight's group."""
    codes = unpack(packed, bits, in_features).float()
    length = in_features if group_size == -1 else group_size
    grouped = codes.reshape(codes.shape[0], in_features // length, length)
    grouped -= 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    grouped *= scales.float().unsqueeze(-1)
    return grouped.reshape(codes.shape)


def grid_matmul_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """x [..., in] times the transpose of the dense weight: products and sums in float32, result in x.dtype."""
    weight = dequantize(packed, scales, zeros, bits=bits, group_size=group_size, in_features=in_features)
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)
