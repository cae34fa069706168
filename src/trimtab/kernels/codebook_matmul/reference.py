"""Plain PyTorch: what codebook_matmul computes."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The dense float32 weight [out, in]; vectors are added in the order of the codebooks, then scaled."""
    entries = codebooks.shape[1]
    vectors = torch.zeros((*codes.shape[:2], codebooks.shape[2]), device=codes.device)
    for m, codebook in enumerate(codebooks.float()):
        vectors += codebook[codes[..., m].int() & (entries - 1)]
    return vectors.flatten(1) * scales.float()[:, None]


def codebook_matmul_reference(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int
) -> Tensor:
    """x [..., in_features] times the transpose of the dense weight: sums in float32, result in x.dtype."""
    return torch.nn.functional.linear(x.float(), dequantize(codes, codebooks, scales)).to(x.dtype)
