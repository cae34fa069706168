"""Plain PyTorch: what sparse_matmul computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.sparse_matmul.bitmap import unpack_bits, unpack_codes
from trimtab.kernels.sparse_matmul.weight import SparseWeight


def dequantize(weight: SparseWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in], zero where nothing is kept; `scale * code` in float32, then rounded to `dtype`."""
    kept = unpack_bits(weight.bitmap, weight.in_features)
    if weight.scales is not None:
        scales = weight.scales.float().repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]
        return (unpack_codes(weight.values, kept) * scales).to(dtype)
    dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
    return dense.masked_scatter(kept, weight.values.to(dtype))


def sparse_matmul_reference(x: Tensor, weights: Sequence[SparseWeight]) -> tuple[Tensor, ...]:
    """x [..., in] times the transpose of each dense weight: products and sums in float32, results in x.dtype."""
    return tuple(torch.nn.functional.linear(x.float(), dequantize(weight)).to(x.dtype) for weight in weights)
