"""Rows of codes from codes that lie channel by channel: the layout of run.py in one pass over the packed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.run import TILE

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of `bits` bytes


def pack_channels(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, H, d, 32 T] uint8, contiguous -> uint8 [R, H, T, d, 4 bits]: what `pack_rows` gives for the same codes.

    Byte k of word w of a row holds codes 8 k + slot * bits + w. Codes that share a byte are `bits` codes apart, so
    integers of `bits` bytes are shifted over one another whole.
    """
    if bits == 3:
        return torch.cat([pack_channels(codes & 3, 2), pack_channels(codes >> 2, 1)], dim=-1)
    words = torch.unflatten(codes, -1, (-1, TILE)).view(_WORDS[bits])
    slots = torch.unflatten(words, -1, (4, 8 // bits))  # [R, H, d, T, byte, slot]
    packed = slots[..., 0].contiguous()
    for slot in range(1, 8 // bits):
        packed |= slots[..., slot] << (slot * bits)
    rows = torch.unflatten(packed.view(torch.uint8), -1, (4, bits))  # [R, H, d, T, byte, word]
    return rows.permute(0, 1, 3, 2, 5, 4).flatten(-2).contiguous()
