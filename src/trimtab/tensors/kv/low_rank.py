"""Low rank of a quantization error, per head, by power iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SEED = 0


def low_rank(error: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """error [B, d, m] float32 -> token factors A [B, r, m] and channel factors B [B, r, d], float16: error ~ B^T A.

    r = min(rank, d, m). Power iteration from a fixed Gaussian start, orthonormalised in every pass:
    A <- orth(error^T B), B <- error A. Source: GEAR (arXiv:2403.05527), section 4.2; its code starts from uniform
    numbers, which all point in nearly the same direction, and orthonormalises in the last pass only.

    A has orthogonal rows of norm 2^p, the power of two nearest to sqrt(m), so that its entries are about 1 and those of
    B are about as large as the error: neither leaves the range of float16.
    """
    batch, channels, tokens = error.shape
    rank = min(rank, channels, tokens)
    start = torch.randn(channels, rank, generator=torch.Generator().manual_seed(_SEED))
    b = start.to(error.device).expand(batch, channels, rank)
    for _ in range(iterations):
        a = torch.linalg.qr(error.transpose(1, 2) @ b).Q  # [B, m, r]
        b = error @ a
    norm = 2.0 ** round(math.log2(tokens) / 2)
    return (a * norm).half().transpose(1, 2).contiguous(), (b / norm).transpose(1, 2).half().contiguous()
