"""Dense streams of bits: published words, and Python's whole numbers as the other truth."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.models.exports.bit_stream import pack_stream, stream_words, unpack_stream

from .readers import stream


def words(packed: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in packed.flatten().tolist()]


def test_published_words() -> None:
    four = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]]) + 8
    assert words(pack_stream(four, 4)) == [0xFEA98710]
    assert pack_stream(four, 4).item() == -22444272
    three = torch.arange(32)[None] % 8
    assert words(pack_stream(three, 3)) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@given(bits=st.integers(1, 8), length=st.integers(1, 130), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_width_and_length_comes_back(bits: int, length: int, rows: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, (rows, length), dtype=np.uint8))
    packed = pack_stream(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, stream_words(length, bits)) == (rows, -(-length * bits // 32))
    assert [stream(row.numpy(), bits, length) for row in packed] == codes.tolist()
    assert torch.equal(unpack_stream(packed, bits, length), codes)
