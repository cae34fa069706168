"""Codes as one dense stream of bits in 32-bit words: the packing of compressed-tensors and of GPTQ.

Element i of a row occupies bits [i b, (i + 1) b) of the row, the lowest bit first, across the borders of words. 32
elements fill b words exactly; where b divides 32 an element never crosses a border.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def stream_words(length: int, bits: int) -> int:
    """32-bit words that `length` elements take."""
    return -(-length * bits // 32)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n], integers in 0 .. 2^bits - 1 (not checked), to int32 [rows, stream_words(n, bits)]."""
    rows, length = codes.shape
    blocks = -(-length // 32)
    padded = torch.nn.functional.pad(codes, (0, blocks * 32 - length)).view(rows, blocks, 32)
    words = torch.zeros(rows, blocks, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = padded[:, :, i].to(torch.int64)
        words[:, :, word] |= code << shift & _WORD
        if shift + bits > 32:
            words[:, :, word + 1] |= code >> 32 - shift
    low = words.view(rows, -1).view(torch.int32)[:, ::2]  # the lower half of each little-endian int64
    return low[:, : stream_words(length, bits)].contiguous()


def unpack_stream(words: Tensor, bits: int, length: int) -> Tensor:
    """The first `length` codes, uint8 [rows, length], of int32 words [rows, stream_words(length, bits)]."""
    rows, blocks = words.shape[0], -(-length // 32)
    padded = torch.nn.functional.pad(words.to(torch.int64) & _WORD, (0, blocks * bits - words.shape[1]))
    grouped = padded.view(rows, blocks, bits)
    codes = torch.empty(rows, blocks, 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = grouped[:, :, word] >> shift
        if shift + bits > 32:
            value |= grouped[:, :, word + 1] << 32 - shift
        codes[:, :, i] = value & (1 << bits) - 1
    return codes.view(rows, -1)[:, :length].contiguous()
