"""Plain PyTorch: what sparse_matmul computes."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.sparse_matmul.bitmap import unpack_bits


def dequantize(bitmap: Tensor, values: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in], zero where nothing is kept."""
    kept = unpack_bits(bitmap, in_features)
    dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
    dense[kept] = values.to(dtype)
    return dense


def sparse_matmul_reference(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """x [..., in] times the transpose of the dense weight: products and sums in float32, results in x.dtype."""
    return torch.nn.functional.linear(x.float(), dequantize(bitmap, values, in_features)).to(x.dtype)
