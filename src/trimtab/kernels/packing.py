"""The byte layout of packed codes, and conversion from and to it. Stored layout = the layout the kernels run on.

A matrix `[out, in]` is packed row by row; rows are independent and have equal length. A row is a sequence of blocks.
A block has L *lanes*. A lane is a 16-bit little-endian word, or for 3 bits three such words, and holds C codes:

    bits   codes per lane C   words per lane P   weights in a block of 32 lanes   bytes
    2      8                  1                  256                              64
    3      16                 3                  512                              192
    4      4                  1                  128                              64
    8      2                  1                  64                               64

A row begins with as many blocks of L = 32 lanes as its weights fill; what remains is one block of
L = ceil(remaining / C) lanes. A block stores its words plane by plane: word p of all lanes, then word p + 1 of all.

Weight number i of a block stands in lane i % L as code k = i // L of that lane:

    2, 4, 8 bits    bits [k * bits, (k + 1) * bits) of the word
    3 bits, k < 15  bits [3 r, 3 r + 3) of word p, where p = k // 5 and r = k % 5
    3 bits, k = 15  bit p of the code is bit 15 of word p, p = 0, 1, 2

So 32 consecutive weights are 32 lanes under one shift: a kernel gets them from one register with one instruction, in
the order of the inputs they multiply, and every bit is used. Codes past the end of the row are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError

LANES = 32
BITS = (2, 3, 4, 8)
_CODES_PER_LANE = {2: 8, 3: 16, 4: 4, 8: 2}
_WORDS_PER_LANE = {2: 1, 3: 3, 4: 1, 8: 1}


def codes_per_lane(bits: int) -> int:
    """Codes that the words of one lane hold."""
    return _CODES_PER_LANE[bits]


def words_per_lane(bits: int) -> int:
    """16-bit words of one lane, each in a plane of its own."""
    return _WORDS_PER_LANE[bits]


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row of `in_features` codes, padding included. Raises ConfigError."""
    return sum(2 * _WORDS_PER_LANE[bits] * lanes * blocks for _, lanes, blocks in _block_runs(in_features, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [out, in], each below 2^bits (not checked), to uint8 [out, packed_bytes(in, bits)].

    Raises ConfigError for another dtype, shape or number of bits.
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ConfigError(f"pack wants codes uint8 [out, in], not {codes.dtype} {list(codes.shape)}.")
    rows, in_features = codes.shape
    packed = torch.empty(rows, packed_bytes(in_features, bits), dtype=torch.uint8, device=codes.device)
    words, done = packed.view(torch.int16), 0
    for start, lanes, blocks in _block_runs(in_features, bits):
        capacity = lanes * _CODES_PER_LANE[bits]
        run = codes[:, start : start + capacity * blocks]
        if run.shape[1] < capacity * blocks:
            run = torch.nn.functional.pad(run, (0, capacity * blocks - run.shape[1]))
        size = _WORDS_PER_LANE[bits] * lanes * blocks
        _pack_run(run.reshape(rows, blocks, _CODES_PER_LANE[bits], lanes), words[:, done : done + size], bits)
        done += size
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The codes uint8 [out, in_features] of a packed matrix. Raises ConfigError if its shape or dtype does not fit."""
    length = packed_bytes(in_features, bits)
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != length:
        raise ConfigError(
            f"packed codes of {in_features} inputs at {bits} bits are uint8 [out, {length}], "
            f"not {packed.dtype} {list(packed.shape)}."
        )
    packed = packed.contiguous()
    if packed.storage_offset() % 2:
        packed = packed.clone()
    rows = packed.shape[0]
    codes = torch.empty(rows, in_features, dtype=torch.uint8, device=packed.device)
    words, done = packed.view(torch.int16), 0
    for start, lanes, blocks in _block_runs(in_features, bits):
        size = _WORDS_PER_LANE[bits] * lanes * blocks
        run = _unpack_run(words[:, done : done + size].reshape(rows, blocks, _WORDS_PER_LANE[bits], lanes), bits)
        part = codes[:, start : start + lanes * blocks * _CODES_PER_LANE[bits]]
        part.copy_(run.flatten(1)[:, : part.shape[1]])
        done += size
    return codes


def _block_runs(in_features: int, bits: int) -> list[tuple[int, int, int]]:
    """(first weight, lanes, blocks) of the full blocks and of the last, narrower one."""
    if bits not in BITS:
        raise ConfigError(f"bits={bits} cannot be packed; choose one of {', '.join(map(str, BITS))}.")
    if in_features < 1:
        raise ConfigError(f"in_features={in_features} must be at least 1.")
    per_lane = _CODES_PER_LANE[bits]
    blocks, rest = divmod(in_features, LANES * per_lane)
    runs = [(0, LANES, blocks)] if blocks else []
    return runs + ([(in_features - rest, -(-rest // per_lane), 1)] if rest else [])


# One run: codes [rows, blocks, codes per lane, lanes] <-> words int16 [rows, blocks, words per lane, lanes].


def _pack_run(codes: Tensor, out: Tensor, bits: int) -> None:
    rows, blocks, per_lane, lanes = codes.shape
    words = torch.zeros(rows, blocks, _WORDS_PER_LANE[bits], lanes, dtype=torch.int16, device=codes.device)
    for k in range(per_lane):
        code = codes[:, :, k].to(torch.int16)
        if bits == 3 and k == 15:
            for p in range(3):
                words[:, :, p] |= ((code >> p) & 1) << 15
        elif bits == 3:
            words[:, :, k // 5] |= code << 3 * (k % 5)
        else:
            words[:, :, 0] |= code << bits * k
    out.copy_(words.flatten(1))


def _unpack_run(words: Tensor, bits: int) -> Tensor:
    rows, blocks, _, lanes = words.shape
    mask = (1 << bits) - 1
    codes = torch.empty(rows, blocks, _CODES_PER_LANE[bits], lanes, dtype=torch.uint8, device=words.device)
    for k in range(_CODES_PER_LANE[bits]):
        if bits == 3 and k == 15:
            tops = [((words[:, :, p] >> 15) & 1) << p for p in range(3)]
            codes[:, :, k] = (tops[0] | tops[1] | tops[2]).to(torch.uint8)
        else:
            word, shift = (words[:, :, k // 5], 3 * (k % 5)) if bits == 3 else (words[:, :, 0], bits * k)
            codes[:, :, k] = ((word >> shift) & mask).to(torch.uint8)
    return codes
