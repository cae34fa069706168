"""A dense weight rounded to GGUF blocks: the nearest that a scale search finds, without importance weights.

Q8_0, Q4_0 and Q4_1 as ggml's reference does it: the extreme value of a block is met exactly, codes are computed with
the unrounded scale. The K types: for each sub-block, several ranges are tried; each gives codes, codes give the scale
(and offset) of least squares, and the best pair is kept. Scales and offsets of a block are then rounded to whole
multiples of its fp16 factors, and codes are rounded anew for what is stored. ggml's own `llama-quantize` weighs the
errors by activation statistics and searches longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.models.exports.gguf_blocks import TYPES, Blocks, BlockType

_AT_ONCE = 1 << 22
"""Weights that are searched at once; bounds the memory."""


def project_blocks(weight: Tensor, name: str) -> Blocks:
    """Blocks of this type near a float32 weight [out, in]; `in` must be a multiple of the block (not checked)."""
    kind = TYPES[name]
    blocks = weight.float().reshape(-1, kind.size)
    parts = [_project(piece, kind) for piece in torch.split(blocks, max(1, _AT_ONCE // kind.size))]
    if len(parts) == 1:
        return parts[0]

    def joined(values: list[Tensor | None]) -> Tensor | None:
        return torch.cat([value for value in values if value is not None]) if values[0] is not None else None

    return Blocks(
        kind,
        torch.cat([part.d for part in parts]),
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        joined([part.offset for part in parts]),
        joined([part.minima for part in parts]),
    )


def _project(w: Tensor, kind: BlockType) -> Blocks:
    if kind.name == "q8_0":
        return _q8_0(w, kind)
    if kind.name == "q4_0":
        return _q4_0(w, kind)
    if kind.name == "q4_1":
        return _q4_1(w, kind)
    return _two_level(w, kind) if kind.zero is None else _two_level_signed(w, kind)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1.0 / d)


def _q8_0(w: Tensor, kind: BlockType) -> Blocks:
    d = w.abs().amax(dim=1) / 127
    scaled = w * _inverse(d)[:, None]
    codes = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)  # half away from zero, as C's roundf
    return Blocks(kind, d.half(), codes.to(torch.int16), _ones(w))


def _q4_0(w: Tensor, kind: BlockType) -> Blocks:
    extreme = w.gather(1, w.abs().argmax(dim=1, keepdim=True))[:, 0]
    d = extreme / -8
    codes = torch.floor(w * _inverse(d)[:, None] + 8.5).clamp(0, 15)
    return Blocks(kind, d.half(), codes.to(torch.int16), _ones(w))


def _q4_1(w: Tensor, kind: BlockType) -> Blocks:
    low = w.amin(dim=1)
    d = (w.amax(dim=1) - low) / 15
    codes = torch.floor((w - low[:, None]) * _inverse(d)[:, None] + 0.5).clamp(0, 15)
    return Blocks(kind, d.half(), codes.to(torch.int16), _ones(w), low.half())


def _ones(w: Tensor) -> Tensor:
    return torch.ones(len(w), 1, dtype=torch.int16)


def _two_level(w: Tensor, kind: BlockType) -> Blocks:
    """Scales and minima of sub-blocks, both at least 0: Q4_K, Q2_K."""
    subs, most, top = w.view(len(w), -1, kind.sub), kind.levels - 1, kind.scales[1]
    step, low = _fit_range(subs, most)
    d, scales = _multiples(step, top)
    dmin, minima = _multiples(low, top)
    stored = d.float()[:, None] * scales
    codes = torch.round((subs + (dmin.float()[:, None] * minima)[:, :, None]) * _inverse(stored)[:, :, None])
    codes = codes.clamp(0, most).to(torch.int16).view(len(w), -1)
    return Blocks(kind, d, codes, scales.to(torch.int16), dmin, minima.to(torch.int16))


def _fit_range(w: Tensor, most: int, trials: int = 24) -> tuple[Tensor, Tensor]:
    """Step and low >= 0 with `w ~ step * code - low`, codes 0 .. most; [n, subs, sub] -> [n, subs] each."""
    low, high = w.amin(dim=2).clamp(max=0.0), w.amax(dim=2)
    span = (high - low).clamp(min=0.0)
    best_step, best_low = span / most, -low
    best = torch.full_like(low, torch.inf)
    for trial in range(trials):
        reach = most * (0.7 + 0.6 * trial / (trials - 1))
        codes = torch.round((w - low[:, :, None]) * (reach * _inverse(span))[:, :, None]).clamp(0, most)
        step, offset = _least_squares(w, codes)
        error = (step[:, :, None] * codes - offset[:, :, None] - w).square().sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        best_step, best_low = torch.where(better, step, best_step), torch.where(better, offset, best_low)
    return best_step, best_low


def _least_squares(w: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The best step >= 0 and offset >= 0 of `step * code - offset` for given codes."""
    n, total = w.shape[2], codes.sum(dim=2)
    squares, cross, plain = codes.square().sum(dim=2), (codes * w).sum(dim=2), w.sum(dim=2)
    determinant = n * squares - total.square()
    step = (n * cross - total * plain) * _inverse(determinant)
    offset = (total * cross - squares * plain) * _inverse(determinant)
    alone = cross * _inverse(squares)  # without offset
    use = (offset < 0) | (determinant <= 0)
    return torch.where(use, alone, step).clamp(min=0.0), torch.where(use, 0.0, offset)


def _two_level_signed(w: Tensor, kind: BlockType) -> Blocks:
    """Signed scales of sub-blocks, no minima: Q6_K, Q3_K."""
    assert kind.zero is not None
    subs, (lowest, highest) = w.view(len(w), -1, kind.sub), kind.scales
    step = _fit_signed(subs, kind.zero)
    extreme = step.gather(1, step.abs().argmax(dim=1, keepdim=True))[:, 0]
    d = (extreme / lowest).half()
    scales = torch.round(step * _inverse(d.float())[:, None]).clamp(lowest, highest)
    stored = d.float()[:, None] * scales
    codes = torch.round(subs * _inverse(stored)[:, :, None]).clamp(-kind.zero, kind.zero - 1) + kind.zero
    return Blocks(kind, d, codes.to(torch.int16).view(len(w), -1), scales.to(torch.int16))


def _fit_signed(w: Tensor, zero: int, trials: int = 19) -> Tensor:
    """Step of either sign with `w ~ step * code`, codes -zero .. zero - 1; [n, subs, sub] -> [n, subs]."""
    extreme = w.gather(2, w.abs().argmax(dim=2, keepdim=True))[:, :, 0]
    best_step, best = -extreme / zero, torch.full_like(extreme, torch.inf)
    for trial in range(trials):
        reach = -(zero + 0.1 * (trial - trials // 2))
        codes = torch.round(w * (reach * _inverse(extreme))[:, :, None]).clamp(-zero, zero - 1)
        step = (codes * w).sum(dim=2) * _inverse(codes.square().sum(dim=2))
        error = (step[:, :, None] * codes - w).square().sum(dim=2)
        better = error < best
        best, best_step = torch.where(better, error, best), torch.where(better, step, best_step)
    return best_step


def _multiples(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """fp16 factor per block and whole numbers 0 .. top per sub-block, for values [n, subs] >= 0."""
    factor = (values.amax(dim=1) / top).half()
    whole = torch.round(values * _inverse(factor.float())[:, None]).clamp(0, top)
    return factor, whole
