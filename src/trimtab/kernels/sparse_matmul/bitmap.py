"""Which entries of a matrix are kept, as one bit each: the layout that the kernels read and checkpoints hold.

Rows are padded to words of 64 columns. Bit c % 64, the least significant first, of word c // 64 of row i says whether
entry (i, c) is kept; as little-endian bytes, bit c % 8 of byte c // 8. Bits past the last column are 0.
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
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask, (0, words(columns) * WORD - columns)).to(torch.uint8)
    octets = (padded.view(rows, words(columns) * 8, 8) << _places(mask)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """int64 [rows, words(columns)] -> bool [rows, columns], the inverse of `pack_bits`."""
    octets = bitmap.contiguous().view(torch.uint8)
    return (octets.unsqueeze(-1) >> _places(bitmap) & 1).bool().flatten(1)[:, :columns]


def _places(on: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=on.device)
