"""Blocks of GGUF tensors: their numbers, their values and their bytes.

Blocks run along `in`. In all types a weight is `scale * code + offset`, the scale and the offset of a sub-block being
made of whole numbers and one or two fp16 factors per block:

    type    block  sub-block  codes   scale             offset             bytes
    Q8_0    32     32         int8    d                 0                  fp16 d, codes
    Q4_0    32     32         0..15   d                 -8 d               fp16 d, nibbles
    Q4_1    32     32         0..15   d                 m                  fp16 d, fp16 m, nibbles
    Q4_K    256    32         0..15   d sc   (0..63)    -dmin m  (0..63)   fp16 d, fp16 dmin, 12 scales, nibbles
    Q2_K    256    16         0..3    d sc   (0..15)    -dmin m  (0..15)   16 scales, 64 codes, fp16 d, fp16 dmin
    Q3_K    256    16         0..7    d sc   (-32..31)  -4 d sc            32 high, 64 low bits, 12 scales, fp16 d
    Q6_K    256    16         0..63   d sc   (int8)     -32 d sc           128 low, 64 high bits, 16 scales, fp16 d

Nibbles of a 32-block: byte j holds code j low and code j + 16 high. Of Q4_K: of each 64 codes, byte j holds code j low
and code j + 32 high. Low bits of Q2_K and Q3_K: of each 128 codes, byte j holds codes j, j + 32, j + 64, j + 96, two
bits each. Source: ggml, `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block type: weights per block and per sub-block, bytes per block, lowest code, codes, what a code of 0 means.

    zero     the code that means 0 where there is no offset of its own; None if there is one
    scales   lowest and highest whole number of a sub-block's scale (and offset); (1, 1) if it has none
    """

    name: str
    size: int
    sub: int
    nbytes: int
    lowest: int
    levels: int
    zero: int | None
    scales: tuple[int, int]


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("q8_0", 32, 32, 34, -128, 256, 0, (1, 1)),
        BlockType("q4_0", 32, 32, 18, 0, 16, 8, (1, 1)),
        BlockType("q4_1", 32, 32, 20, 0, 16, None, (1, 1)),
        BlockType("q4_k", 256, 32, 144, 0, 16, None, (0, 63)),
        BlockType("q2_k", 256, 16, 84, 0, 4, None, (0, 15)),
        BlockType("q3_k", 256, 16, 110, 0, 8, 4, (-32, 31)),
        BlockType("q6_k", 256, 16, 210, 0, 64, 32, (-128, 127)),
    )
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [out, in] in blocks, n = out * in / size of them, row after row.

    d            fp16 [n]
    codes        int16 [n, size]
    scales       int16 [n, size / sub]; all 1 where the type has none
    offset       fp16 [n]: `m` of Q4_1 (added), `dmin` of Q4_K and Q2_K (subtracted); None in other types
    minima       int16 [n, size / sub]: whole numbers that dmin is multiplied by; None in other types
    """

    type: BlockType
    d: Tensor
    codes: Tensor
    scales: Tensor
    offset: Tensor | None = None
    minima: Tensor | None = None

    def values(self, shape: tuple[int, int]) -> Tensor:
        """The weights that a reader computes, float32 [out, in]."""
        codes = self.codes.float().view(len(self.d), -1, self.type.sub)
        step = self.d.float()[:, None] * self.scales.float()
        if self.type.zero is not None:
            found = step[:, :, None] * (codes - self.type.zero)
        else:
            assert self.offset is not None
            offset = self.offset.float()[:, None]
            offset = offset if self.minima is None else -offset * self.minima.float()
            found = step[:, :, None] * codes + offset[:, :, None]
        return found.view(shape)

    def tobytes(self, rows: int) -> Tensor:
        """uint8 [rows, bytes of a row], as in the file."""
        return _WRITERS[self.type.name](self).view(rows, -1)


def _half(*factors: Tensor | None) -> Tensor:
    """fp16 [n] each -> their bytes, uint8 [n, 2 each]."""
    return torch.stack([factor for factor in factors if factor is not None], dim=1).contiguous().view(torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    """The low 8 bits of whole numbers."""
    return (values & 0xFF).to(torch.uint8)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """[n, size] -> [n, size / 2]: of each 2 `run` codes, the first half low, the second high."""
    halves = codes.view(len(codes), -1, 2, run)
    return _bytes(halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _crumbs(codes: Tensor) -> Tensor:
    """The low two bits of [n, 256] -> [n, 64]: of each 128 codes, four runs of 32 side by side."""
    runs = (codes & 3).view(len(codes), 2, 4, 32)
    return _bytes(runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).flatten(1)


def _q8_0(blocks: Blocks) -> Tensor:
    return torch.cat([_half(blocks.d), _bytes(blocks.codes)], dim=1)


def _q4(blocks: Blocks) -> Tensor:
    return torch.cat([_half(blocks.d, blocks.offset), _nibbles(blocks.codes, 16)], dim=1)


def _q4_k(blocks: Blocks) -> Tensor:
    assert blocks.minima is not None
    scales, minima = blocks.scales, blocks.minima
    packed = torch.empty(len(scales), 12, dtype=torch.int16)
    packed[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    packed[:, 8:] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    return torch.cat([_half(blocks.d, blocks.offset), _bytes(packed), _nibbles(blocks.codes, 32)], dim=1)


def _q2_k(blocks: Blocks) -> Tensor:
    assert blocks.minima is not None
    packed = _bytes(blocks.scales | blocks.minima << 4)
    return torch.cat([packed, _crumbs(blocks.codes), _half(blocks.d, blocks.offset)], dim=1)


def _q3_k(blocks: Blocks) -> Tensor:
    high = (blocks.codes >> 2).view(-1, 8, 32)
    masks = sum((high[:, bit] << bit for bit in range(1, 8)), high[:, 0])
    scales = blocks.scales + 32
    packed = torch.empty(len(scales), 12, dtype=torch.int16)
    packed[:, :8] = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    fours = (scales >> 4).view(-1, 4, 4)
    packed[:, 8:] = fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6
    return torch.cat([_bytes(masks), _crumbs(blocks.codes), _bytes(packed), _half(blocks.d)], dim=1)


def _q6_k(blocks: Blocks) -> Tensor:
    low = (blocks.codes & 15).view(-1, 2, 2, 64)  # of each 128: the first 64 low, the others high
    high = _crumbs(blocks.codes >> 4)
    nibbles = _bytes(low[:, :, 0] | low[:, :, 1] << 4).flatten(1)
    return torch.cat([nibbles, high, _bytes(blocks.scales), _half(blocks.d)], dim=1)


_WRITERS: dict[str, Callable[[Blocks], Tensor]] = {
    "q8_0": _q8_0,
    "q4_0": _q4,
    "q4_1": _q4,
    "q4_k": _q4_k,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q6_k": _q6_k,
}
