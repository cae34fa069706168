"""Which entries of a matrix are kept, as one bit each, and codes of what is kept: the layouts that the kernels read and
checkpoints hold.

Rows are padded to words of 64 columns. Bit c % 64, the least significant first, of word c // 64 of row i says whether
entry (i, c) is kept; as little-endian bytes, bit c % 8 of byte c // 8. Bits past the last column are 0.

Codes are whole numbers from -8 to 7 in four bits, two to a byte, the first in the lower half. The kept entries of every
word begin a new byte, so that a kernel finds them by counting bits; where their number is odd, half a byte is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64
"""Columns of a word."""


def words(columns: int) -> int:
    """Words of a row."""
    return -(-columns // WORD)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [rows, columns] -> int64 [rows, words(columns)]."""
    padded = _whole_words(mask).to(torch.uint8)
    octets = (padded.view(len(mask), padded.shape[1] // 8, 8) << _places(mask)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """int64 [rows, words(columns)] -> bool [rows, columns], the inverse of `pack_bits`."""
    octets = bitmap.contiguous().view(torch.uint8)
    return (octets.unsqueeze(-1) >> _places(bitmap) & 1).bool().flatten(1)[:, :columns]


def row_offsets(counts: Tensor) -> Tensor:
    """Length of each row [rows] -> where it begins, and the end of the last, int64 [rows + 1]."""
    return torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))


def code_bytes(mask: Tensor) -> Tensor:
    """Bytes that the codes of each row take, int64 [rows], for the bool [rows, columns] of what is kept."""
    return ((_by_word(mask).sum(-1) + 1) // 2).view(len(mask), words(mask.shape[1])).sum(1)


def pack_codes(codes: Tensor, mask: Tensor) -> Tensor:
    """The bytes, uint8, of those codes int8 [rows, columns], from -8 to 7, that bool `mask` keeps."""
    halves = torch.nn.functional.pad(_by_word(codes), (0, 1))[_filled(_by_word(mask))].view(torch.uint8) & 15
    return halves[::2] | halves[1::2] << 4


def unpack_codes(packed: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack_codes`: int8 [rows, columns], 0 where nothing is kept."""
    rows, columns = mask.shape
    halves = (torch.stack([packed & 15, packed >> 4], dim=-1).flatten() ^ 8).view(torch.int8) - 8
    places = _filled(_by_word(mask))
    spread = torch.zeros(places.shape, dtype=torch.int8, device=mask.device).masked_scatter_(places, halves)
    return spread[:, :WORD].reshape(rows, words(columns) * WORD)[:, :columns]


def _by_word(matrix: Tensor) -> Tensor:
    """[rows, columns] -> [rows * words, 64]."""
    rows, columns = matrix.shape
    return _whole_words(matrix).reshape(rows * words(columns), WORD)


def _filled(kept: Tensor) -> Tensor:
    """bool [words, 65]: what is kept, and behind it the half byte that fills up an odd number."""
    return torch.cat([kept, (kept.sum(1, keepdim=True) % 2).bool()], dim=1)


def _whole_words(mask: Tensor) -> Tensor:
    columns = mask.shape[1]
    return torch.nn.functional.pad(mask, (0, words(columns) * WORD - columns))


def _places(on: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=on.device)
