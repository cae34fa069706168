"""Plain PyTorch: what grid_matmul computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.packing import unpack


def dequantize(weight: GridWeight) -> Tensor:
    """The dense float32 weight [out, in]: `scale * (code - zero)` or `scale * levels[code]` of each weight's group."""
    codes = unpack(weight.packed, weight.bits, weight.in_features)
    if weight.levels is not None:
        table = weight.levels.expand(codes.shape[0], -1)
        values = torch.gather(table, 1, codes.long())
    else:
        values = codes.float()
    length = weight.in_features if weight.group_size == -1 else weight.group_size
    grouped = values.reshape(codes.shape[0], weight.in_features // length, length)
    if weight.levels is None:
        grouped = grouped - (2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.float().unsqueeze(-1))
    return (grouped * weight.scales.float().unsqueeze(-1)).reshape(codes.shape)


def grid_matmul_reference(x: Tensor, weights: Sequence[GridWeight]) -> tuple[Tensor, ...]:
    """x [..., in] times the transpose of each dense weight: products and sums in float32, results in x.dtype."""
    return tuple(torch.nn.functional.linear(x.float(), dequantize(weight)).to(x.dtype) for weight in weights)
