"""The packed layout: exact both ways, exact in size, and never another one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import ConfigError
from trimtab.kernels.packing import BITS, pack, packed_bytes, unpack

WORD_BYTES = {2: 2, 3: 6, 4: 2, 8: 2}  # bytes of one lane


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 4),
    width=st.integers(1, 1200),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(bits: int, rows: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(width, bits))
    assert torch.equal(unpack(packed, bits, width), codes)


@given(bits=st.sampled_from(BITS), width=st.integers(1, 20000))
def test_padding_is_less_than_one_lane(bits: int, width: int) -> None:
    assert 0 <= packed_bytes(width, bits) - width * bits / 8 < WORD_BYTES[bits]


def _slow_pack(codes: list[int], bits: int) -> bytes:
    """The layout word by word, from its description."""
    per_lane = {2: 8, 3: 16, 4: 4, 8: 2}[bits]
    out = b""
    start = 0
    while start < len(codes):
        rest = len(codes) - start
        lanes = 32 if rest >= 32 * per_lane else -(-rest // per_lane)
        words = [[0] * lanes for _ in range(3 if bits == 3 else 1)]
        for i, code in enumerate(codes[start : start + lanes * per_lane]):
            lane, k = i % lanes, i // lanes
            if bits == 3 and k == 15:
                for p in range(3):
                    words[p][lane] |= (code >> p & 1) << 15
            elif bits == 3:
                words[k // 5][lane] |= code << 3 * (k % 5)
            else:
                words[0][lane] |= code << bits * k
        out += b"".join(word.to_bytes(2, "little") for plane in words for word in plane)
        start += lanes * per_lane
    return out


@given(bits=st.sampled_from(BITS), width=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_bytes_are_those_of_the_description(bits: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (1, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert bytes(pack(codes, bits)[0].tolist()) == _slow_pack(codes[0].tolist(), bits)


# Written once. Stored checkpoints hold this layout: a change here is a new format version, not a new constant.
GOLDEN = {
    2: "93134e0e3939",
    3: "cb3b82297917300507000000",
    4: "d3174a8eb1f5280c9f03060a",
    8: "03500a57115e18651f6c26732d7a34813b88428f4900",
}


@pytest.mark.parametrize("bits", BITS)
def test_stored_bytes_never_change(bits: int) -> None:
    codes = torch.tensor([[(i * 7 + 3) % 2**bits for i in range(21)]], dtype=torch.uint8)
    assert bytes(pack(codes, bits)[0].tolist()).hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", BITS)
def test_unpack_takes_rows_of_a_larger_matrix(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (6, 77), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits)[2:5], bits, 77), codes[2:5])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: packed_bytes(8, 5), "bits=5 .* 2, 3, 4, 8"),
        (lambda: packed_bytes(0, 4), "in_features=0"),
        (lambda: pack(torch.zeros(3, 4), 4), "uint8 .* not torch.float32 .*3, 4"),
        (lambda: unpack(torch.zeros(3, 4, dtype=torch.uint8), 4, 9), r"uint8 \[out, 6\], not .* \[3, 4\]"),
    ],
)
def test_refusals_name_what_is_wrong(call: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()  # type: ignore[operator]
