"""Codebooks of coupled channels: the nearest centroid (the fit follows)."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """points [G, T, c], centroids [G, K, c], float32 -> int64 [G, T], the nearest in L2; of equal ones the first.

    |p - q|^2 less |p|^2, with both moved by the mean centroid so that large means cost no digits; a slice of T at a
    time, so that distances take at most 64 MiB.
    """
    centre = centroids.mean(1, keepdim=True)
    centroids = centroids - centre
    norms = centroids.square().sum(2)[:, None, :]
    chunk = max(1, _CHUNK_BYTES // (4 * norms.numel()))
    transposed = centroids.transpose(1, 2)
    return torch.cat(
        [
            torch.baddbmm(norms, points[:, start : start + chunk] - centre, transposed, alpha=-2.0).argmin(2)
            for start in range(0, points.shape[1], chunk)
        ],
        dim=1,
    )
