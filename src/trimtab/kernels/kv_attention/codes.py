"""Rows of codes: 32 tokens of one channel, as laid out in run.py. Packing is exact and has one layout."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention.run import CODE_BITS, TILE, tiles

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of `bits` bytes."""


def row_bytes(bits: int) -> int:
    """Bytes of a row of 32 codes."""
    return 4 * bits


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., m, c] (integers below 2^bits, not checked) -> uint8 [..., T, c, 4 bits]; tokens past m are code zero.

    Raises ConfigError for another number of bits than 1, 2, 3, 4, 8.
    """
    *lead, tokens, channels = codes.shape
    padded = torch.zeros((*lead, channels, tiles(tokens) * TILE), dtype=torch.uint8, device=codes.device)
    padded[..., :tokens] = codes.transpose(-1, -2)
    return pack_channels(padded, bits)


def pack_channels(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., c, 32 T] uint8, contiguous, channel by channel -> uint8 [..., T, c, 4 bits], as `pack_rows`.

    Byte k of word w of a row holds codes 8 k + slot * bits + w. Codes that share a byte are `bits` codes apart, so
    integers of `bits` bytes are shifted over one another whole.
    """
    _check(bits)
    if bits == 3:
        return torch.cat([pack_channels(codes & 3, 2), pack_channels(codes >> 2, 1)], dim=-1)
    words = torch.unflatten(codes, -1, (-1, TILE)).view(_WORDS[bits])
    slots = torch.unflatten(words, -1, (4, 8 // bits))  # [..., c, T, byte, slot]
    packed = slots[..., 0].contiguous()
    for slot in range(1, 8 // bits):
        packed |= slots[..., slot] << (slot * bits)
    rows = torch.unflatten(packed.view(torch.uint8), -1, (4, bits))  # [..., c, T, byte, word]
    return rows.transpose(-1, -2).transpose(-3, -4).flatten(-2).contiguous()


def unpack_rows(packed: Tensor, bits: int, tokens: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [..., T, c, 4 bits] -> uint8 [..., tokens, c]."""
    _check(bits)
    rows = _unpack(packed[..., :8], 2) | _unpack(packed[..., 8:], 1) << 2 if bits == 3 else _unpack(packed, bits)
    return rows.transpose(-1, -2).flatten(-3, -2)[..., :tokens, :]


def _unpack(packed: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = torch.unflatten(packed, -1, (bits, 4)).transpose(-1, -2)  # [..., byte, word]
    shifts = (torch.arange(per_byte, device=packed.device) * bits).to(torch.uint8)[:, None]
    return ((parts[..., None, :] >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _check(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ConfigError(f"rows of codes have {', '.join(map(str, CODE_BITS))} bits, not {bits}.")
