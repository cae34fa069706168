"""Codebooks of coupled channels: weighted k-means for many groups at once, and the nearest centroid.

Source: Coupled Quantization (arXiv:2405.03917), which publishes no code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError

_CHUNK_BYTES = 64 << 20
_TOLERANCE = 1e-5


def fit_codebook(
    points: Tensor, bits: int, weights: Tensor | None = None, *, iterations: int = 100, seed: int = 0
) -> Tensor:
    """Centroids float16 [G, 2^bits, c] of least sum w |p - q(p)|^2, for each group on its own.

    points      [G, T, c]
    weights     [G, T], not negative: squared gradients of the loss, summed over the coupled channels (Fisher-guided).
                None: all equal. Only their ratios within a group matter
    iterations  at most; fewer when no group's error falls by a hundred-thousandth
    seed        of k-means++, which draws the first centroids by weight and squared distance

    Lloyd's iterations. Centroids without weight move to the points of largest weighted error. Float32. Memory
    beside the points: about three times theirs and 128 MiB; give a few heads at a time.

    Raises ConfigError for fewer tokens than centroids, NumericsError for NaN, infinity or negative weights.
    """
    groups, tokens, width = points.shape
    count = 1 << bits
    if tokens < count:
        raise ConfigError(f"{tokens} tokens for {count} centroids; calibrate with more tokens, or with fewer bits.")
    points = points.float()
    w = torch.ones(points.shape[:2], device=points.device) if weights is None else weights.float()
    if not bool(torch.isfinite(points).all() & torch.isfinite(w).all() & (w >= 0).all() & (w.sum(1) > 0).all()):
        raise NumericsError("codebooks are fitted to finite points with finite weights, not negative, not all zero.")
    w = w / w.amax(1, keepdim=True)
    centroids = _first_centroids(points, w, count, torch.Generator().manual_seed(seed))
    offsets = torch.arange(groups, device=points.device)[:, None] * count
    best = torch.full((groups,), torch.inf, dtype=torch.float64, device=points.device)
    for _ in range(iterations):
        codes = nearest_centroid(points, centroids)
        near = _taken(centroids, codes)
        errors = w * (points - near).square().sum(2)
        error = errors.sum(1, dtype=torch.float64)
        if bool((error >= best * (1 - _TOLERANCE)).all()):
            break
        best = error
        place = (codes + offsets).flatten()
        mass = torch.zeros(groups * count, device=points.device).index_add_(0, place, w.flatten())
        moved = (w[..., None] * (points - near)).flatten(0, 1)  # relative to the centroid: large means cost no digits
        step = torch.zeros(groups * count, width, device=points.device).index_add_(0, place, moved)
        step /= mass.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        centroids = centroids + step.view_as(centroids)
        centroids = _reseeded(centroids, mass.view(groups, count) <= 0, points, errors)
    return centroids.half()


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


def _first_centroids(points: Tensor, w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centroid is a point drawn by weight times squared distance to the nearest one so far."""
    groups = torch.arange(len(points), device=points.device)
    draws = torch.rand(count, len(points), 1, generator=generator, dtype=torch.float64).to(points.device)
    distance = torch.ones_like(w)
    chosen: list[Tensor] = []
    for draw in draws:
        odds = (w * distance).double().cumsum(1)
        place = torch.searchsorted(odds, draw * odds[:, -1:], right=True).clamp(max=points.shape[1] - 1)[:, 0]
        chosen.append(points[groups, place])
        apart = (points - chosen[-1][:, None]).square().sum(2)
        distance = apart if len(chosen) == 1 else torch.minimum(distance, apart)
    return torch.stack(chosen, dim=1)


def _reseeded(centroids: Tensor, empty: Tensor, points: Tensor, errors: Tensor) -> Tensor:
    """Give each empty centroid of a group another one of its worst points."""
    most = int(empty.sum(1).max())
    if most == 0:
        return centroids
    worst = _taken(points, errors.topk(most, dim=1).indices)
    which = (empty.cumsum(1) - 1).clamp(min=0)
    return torch.where(empty[..., None], _taken(worst, which), centroids)


def _taken(table: Tensor, index: Tensor) -> Tensor:
    """table [G, K, c] at index [G, n] -> [G, n, c]."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[2]))
