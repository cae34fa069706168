"""Rows of codes: 32 tokens of one channel, as laid out in run.py. Packing is exact and has one layout."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention.run import CODE_BITS, TILE, tiles


def row_bytes(bits: int) -> int:
    """Bytes of a row of 32 codes."""
    return 4 * bits


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., m, c] (integers below 2^bits, not checked) -> uint8 [..., T, c, 4 bits]; tokens past m are code zero.

    Raises ConfigError for another number of bits than 1, 2, 3, 4, 8.
    """
    _check(bits)
    *lead, tokens, channels = codes.shape
    padded = torch.zeros((*lead, tiles(tokens) * TILE, channels), dtype=torch.uint8, device=codes.device)
    padded[..., :tokens, :] = codes.to(torch.uint8)
    rows = torch.unflatten(padded, -2, (-1, TILE)).transpose(-1, -2)  # [..., T, c, 32]
    if bits == 3:
        return torch.cat([_pack(rows & 3, 2), _pack(rows >> 2, 1)], dim=-1)
    return _pack(rows, bits)


def unpack_rows(packed: Tensor, bits: int, tokens: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [..., T, c, 4 bits] -> uint8 [..., tokens, c]."""
    _check(bits)
    if bits == 3:
        rows = _unpack(packed[..., :8], 2) | (_unpack(packed[..., 8:], 1) << 2)
    else:
        rows = _unpack(packed, bits)
    return rows.transpose(-1, -2).flatten(-3, -2)[..., :tokens, :]


def _pack(rows: Tensor, bits: int) -> Tensor:
    """[..., 32] codes -> [..., 4 bits] bytes. Byte k of word w holds codes j with j % bits = w, 8 / bits of them."""
    per_byte = 8 // bits
    # code j = (byte * per_byte + slot) * bits + word
    parts = torch.unflatten(rows, -1, (4, per_byte, bits))
    shifts = (torch.arange(per_byte, device=rows.device) * bits).to(torch.uint8)[:, None]
    summed = (parts << shifts).sum(dim=-2, dtype=torch.uint8)  # [..., byte, word]
    return summed.transpose(-1, -2).flatten(-2).contiguous()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = torch.unflatten(packed, -1, (bits, 4)).transpose(-1, -2)  # [..., byte, word]
    shifts = (torch.arange(per_byte, device=packed.device) * bits).to(torch.uint8)[:, None]
    return ((parts[..., None, :] >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _check(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ConfigError(f"rows of codes have {', '.join(map(str, CODE_BITS))} bits, not {bits}.")
