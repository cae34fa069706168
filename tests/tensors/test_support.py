"""Weights with zeros, stored without them: exact in every bit, counted in bytes, refused when damaged."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors import Bitmap, CompressedTensor, Metric, Part, TwoOfFour
from trimtab.tensors.base import part_from_state
from trimtab.tensors.bitmap import pack_bits, unpack_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def example(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A weight, and a random support."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, torch.rand(rows, columns, generator=generator) < 0.5


def two_of_four(rows: int, columns: int, seed: int = 0) -> Tensor:
    scores = torch.rand(rows * columns // 4, 4, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(dim=1).argsort(dim=1) < 2).view(rows, columns)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_a_bitmap_gives_back_every_bit(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    weight, keep = example(rows, columns, seed, dtype)
    part = Bitmap.from_dense(weight, keep)
    assert torch.equal(part.mask(), keep)
    assert torch.equal(part.dequantize(dtype), torch.where(keep, weight, 0))
    again = part_from_state(part.spec(), part.state())
    again.check()
    assert torch.equal(again.dequantize(dtype), part.dequantize(dtype))
    wide = -(-columns // 64)
    assert part.nbytes == 8 * rows * wide + dtype.itemsize * int(keep.sum()) + 4 * (rows + 1)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), fours=st.integers(1, 50), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_two_of_four_gives_back_every_bit(rows: int, fours: int, seed: int, dtype: torch.dtype) -> None:
    weight, _ = example(rows, 4 * fours, seed, dtype)
    keep = two_of_four(rows, 4 * fours, seed)
    part = TwoOfFour.from_dense(weight, keep)
    assert torch.equal(part.mask(), keep)
    assert torch.equal(part.dequantize(dtype), torch.where(keep, weight, 0))
    again = part_from_state(part.spec(), part.state())
    again.check()
    assert torch.equal(again.dequantize(dtype), part.dequantize(dtype))


def test_the_layout_of_a_bitmap_is_the_one_that_is_described() -> None:
    """Column c is bit c % 64 of word c // 64, least significant first; values go row by row."""
    weight = torch.arange(1.0, 2 * 70 + 1).view(2, 70)
    keep = torch.zeros(2, 70, dtype=torch.bool)
    keep[0, [0, 3, 63]] = True
    keep[1, [64, 69]] = True
    part = Bitmap.from_dense(weight, keep)
    assert part.bitmap.tolist() == [[1 | 1 << 3 | -(1 << 63), 0], [0, 1 | 1 << 5]]
    assert part.values.tolist() == [1, 4, 64, 135, 140]
    assert part.offsets.tolist() == [0, 3, 5]


def test_positions_of_two_of_four_are_packed_codes() -> None:
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]]).bool()
    part = TwoOfFour.from_dense(torch.arange(8.0)[None], keep)
    assert part.values.tolist() == [[0, 3, 5, 6]]
    assert part.positions.numel() == 2  # one lane of eight 2-bit codes
    assert part.positions.view(torch.int16).item() == 0 | 3 << 2 | 1 << 4 | 2 << 6


def test_half_of_a_16_bit_weight_takes_less_than_58_percent() -> None:
    for rows, columns in ((704, 256), (256, 704), (512, 2048)):
        weight, _ = example(rows, columns)
        keep = two_of_four(rows, columns)
        for part in (Bitmap.from_dense(weight, keep), TwoOfFour.from_dense(weight, keep)):
            assert part.nbytes <= 0.58 * weight.numel() * 2
            assert CompressedTensor((part,)).nbytes == part.nbytes


def test_a_file_has_the_bytes_that_are_counted(tmp_path: Path) -> None:
    weight, keep = example(64, 192)
    part = Bitmap.from_dense(weight, keep)
    save_file(part.state(), tmp_path / "part.safetensors")
    assert part.nbytes < (tmp_path / "part.safetensors").stat().st_size < part.nbytes + 400
    again = part_from_state(part.spec(), load_file(tmp_path / "part.safetensors"))
    assert torch.equal(again.dequantize(), part.dequantize())


@pytest.mark.parametrize("part", [Bitmap, TwoOfFour])
def test_products_are_those_of_the_dense_weight(part: type[Bitmap] | type[TwoOfFour]) -> None:
    weight, _ = example(24, 64, dtype=torch.float32)
    made = part.from_dense(weight, two_of_four(24, 64))
    x = torch.randn(3, 64)
    torch.testing.assert_close(made.matmul(x), x @ made.dequantize().T)


@pytest.mark.parametrize("part", [Bitmap, TwoOfFour])
def test_projection_takes_new_values_on_the_same_support(part: type[Bitmap] | type[TwoOfFour]) -> None:
    weight, keep = example(8, 64)[0], two_of_four(8, 64)
    target = torch.randn(8, 64).half().float()
    made: Part = part.from_dense(weight, keep, torch.float16)
    assert torch.equal(made.project(target).dequantize(), torch.where(keep, target, 0))
    with pytest.raises(ConfigError, match="least squares"):
        made.project(target, Metric.gram(torch.eye(64)))
    with pytest.raises(ConfigError, match=r"target of shape \[8, 63\]"):
        made.project(target[:, 1:])


def test_kept_zeros_are_kept() -> None:
    part = Bitmap.from_dense(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool))
    assert part.values.numel() == 10
    assert part.density == 1
    assert bool(part.mask().all())


def test_nothing_kept_is_a_zero_matrix() -> None:
    part = Bitmap.from_dense(torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool))
    part.check()
    assert torch.equal(part.dequantize(), torch.zeros(2, 5))


def test_damage_is_named() -> None:
    part = Bitmap.from_dense(*example(4, 70))
    state = part.state()
    past = state["bitmap"].clone()
    past[2, 1] |= 1 << 6
    flipped = state["bitmap"].clone()
    flipped[0, 0] ^= 1
    values = state["values"].clone()
    values[3] = torch.nan
    for name, buffer, message in (
        ("bitmap", past, "past column 70"),
        ("bitmap", flipped, "row offsets are not those of the bitmap"),
        ("offsets", state["offsets"].roll(1), "row offsets are not those"),
        ("values", values, "NaN"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Bitmap.from_state(part.spec(), {**state, name: buffer}).check()
    with pytest.raises(CheckpointError, match="'entries' must be a count"):
        Bitmap.from_state({**part.spec(), "entries": 281}, state)
    with pytest.raises(CheckpointError, match="asks for torch.bfloat16"):
        Bitmap.from_state({**part.spec(), "entries": part.values.numel() - 1}, state)
    other = TwoOfFour.from_dense(example(4, 8)[0], two_of_four(4, 8))
    with pytest.raises(CheckpointError, match="do not ascend"):
        TwoOfFour.from_state(other.spec(), {**other.state(), "positions": torch.zeros_like(other.positions)}).check()
    with pytest.raises(CheckpointError, match="no multiple of 4"):
        TwoOfFour.from_state({**other.spec(), "shape": [4, 6]}, other.state())


def test_what_cannot_be_stored_is_refused() -> None:
    weight, keep = example(4, 8, dtype=torch.float32)
    with pytest.raises(ConfigError, match="row 0 does not keep two of columns 4 to 7"):
        TwoOfFour.from_dense(weight, torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]).bool().expand(4, 8))
    with pytest.raises(ConfigError, match="multiple of 4"):
        TwoOfFour.from_dense(weight[:, :6], keep[:, :6])
    with pytest.raises(ConfigError, match="torch.float64"):
        Bitmap.from_dense(weight.double(), keep)
    with pytest.raises(ConfigError, match="bool mask"):
        Bitmap.from_dense(weight, keep.float())
    with pytest.raises(NumericsError, match="beyond torch.float16"):
        Bitmap.from_dense(weight * 1e6, torch.ones_like(keep), torch.float16)


@given(rows=st.integers(1, 4), columns=st.integers(1, 150), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_bits_round_trip(rows: int, columns: int, seed: int) -> None:
    _, keep = example(rows, columns, seed)
    assert torch.equal(unpack_bits(pack_bits(keep), columns), keep)
