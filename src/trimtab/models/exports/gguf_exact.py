"""A grid as GGUF blocks, code by code: which block types hold it, and the blocks.

A group of our grid is `scale * (code - zero)`. A block type holds it if one group covers whole blocks (so one scale
serves a block), if the scale is an fp16 number, and if the whole numbers `code - zero` are among its codes. The offset
of Q4_1 is one fp16 number per block and need not hold `-scale * zero` exactly: there codes and scales carry over as
they are, and the offset is rounded. The two-level types (K) then have scales of 1 and minima of `zero`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.models.exports.base import scales_as
from trimtab.models.exports.gguf_blocks import TYPES, Blocks
from trimtab.tensors.grid import GroupGrid

EXACT_TYPES = ("q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q6_k", "q8_0")
"""In the order of preference: the smallest first, of equal size the one that computes fastest."""


def exact_blocks(grid: GroupGrid, name: str) -> Blocks | None:
    """The grid's own codes and scales as blocks of this type; None if the type cannot hold them."""
    kind, length = TYPES[name], grid.format.group_length(grid.shape)
    scales = scales_as(grid, torch.float16)
    if scales is None or length % kind.size:
        return None
    codes = grid.codes().to(torch.int16)
    zeros = torch.full(scales.shape, grid.format.levels // 2) if grid.zeros is None else grid.zeros
    zeros = zeros.to(torch.int16)
    per_group = length // kind.size
    d = scales.repeat_interleave(per_group, dim=1).flatten()
    subs = kind.size // kind.sub
    if kind.zero is not None:
        codes = codes - zeros.repeat_interleave(length, dim=1) + kind.zero
    if int(codes.min()) < kind.lowest or int(codes.max()) >= kind.lowest + kind.levels:
        return None
    offset = minima = None
    if kind.zero is None:
        zeros = zeros.repeat_interleave(per_group, dim=1).flatten()
        if kind.scales == (1, 1):
            offset = (-d.float() * zeros.float()).half()
            if not bool(torch.isfinite(offset).all()):
                return None
        elif int(zeros.max()) > kind.scales[1]:
            return None
        else:
            offset, minima = d, _per_sub(zeros, subs)
    ones = torch.ones(len(d), subs, dtype=torch.int16)
    return Blocks(kind, d, codes.reshape(-1, kind.size), ones, offset, minima)


def smallest_exact(grid: GroupGrid) -> Blocks | None:
    """Blocks of the smallest type that holds the grid's codes and scales, None if none does."""
    found = (exact_blocks(grid, name) for name in EXACT_TYPES)
    return next((blocks for blocks in found if blocks is not None), None)


def _per_sub(values: Tensor, subs: int) -> Tensor:
    return values[:, None].repeat(1, subs)
