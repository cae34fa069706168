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
from trimtab.kernels.sparse_matmul.bitmap import code_bytes
from trimtab.tensors import Bitmap, CompressedTensor, Metric, Part, SparseGrid
from trimtab.tensors.base import part_from_state
from trimtab.tensors.support import SupportPart

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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99), group=st.sampled_from((64, 128, 192))
)
def test_codes_are_the_nearest_of_their_group(rows: int, columns: int, seed: int, group: int) -> None:
    """Within half a step of what is kept, but for the largest positive number, which may clip by half a step."""
    weight, keep = example(rows, columns, seed, torch.float32)
    part = SparseGrid.from_dense(weight, keep, group)
    assert torch.equal(part.mask(), keep)
    assert part.scales.shape == (rows, -(-columns // group))
    found, steps = part.dequantize(), part.scales.float().repeat_interleave(group, dim=1)[:, :columns]
    assert not bool(found[~keep].any())
    assert bool(((found - weight).abs() <= 0.54 * steps)[keep].all())
    codes = (found / steps)[keep]
    assert torch.equal(codes, codes.round())
    again = part_from_state(part.spec(), part.state())
    again.check()
    assert torch.equal(again.dequantize(), found)
    assert part.nbytes == (8 * rows * -(-columns // 64)) + int(code_bytes(keep).sum()) + 4 * (rows + 1) + (
        2 * part.scales.numel()
    )


def test_a_scale_does_not_see_what_is_removed() -> None:
    weight = torch.full((1, 64), 0.75)
    weight[0, 5] = 100.0
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[0, 5] = False
    assert SparseGrid.from_dense(weight, keep).scales.item() == pytest.approx(0.1, rel=0.01)
    kept = SparseGrid.from_dense(weight, keep, scales=torch.tensor([[0.25]]).bfloat16())
    assert torch.equal(kept.dequantize(), torch.where(keep, weight, 0))


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


def test_half_of_a_weight_takes_less_than_58_percent_and_3_4_bits_with_codes() -> None:
    for rows, columns in ((704, 256), (256, 704), (512, 2048)):
        weight, keep = example(rows, columns)
        for support in (keep, two_of_four(rows, columns)):
            part = Bitmap.from_dense(weight, support)
            assert part.nbytes <= 0.58 * weight.numel() * 2
            assert CompressedTensor((part,)).nbytes == part.nbytes
            assert 8 * SparseGrid.from_dense(weight, support).nbytes <= 3.42 * weight.numel()


def test_a_file_has_the_bytes_that_are_counted(tmp_path: Path) -> None:
    weight, keep = example(64, 192)
    part = Bitmap.from_dense(weight, keep)
    save_file(part.state(), tmp_path / "part.safetensors")
    assert part.nbytes < (tmp_path / "part.safetensors").stat().st_size < part.nbytes + 400
    again = part_from_state(part.spec(), load_file(tmp_path / "part.safetensors"))
    assert torch.equal(again.dequantize(), part.dequantize())


MADE = pytest.mark.parametrize("part", [Bitmap, SparseGrid])


@MADE
def test_products_are_those_of_the_dense_weight(part: type[Bitmap] | type[SparseGrid]) -> None:
    made: Part = part.from_dense(*example(24, 130, dtype=torch.float32))
    for rows in (3, 30):
        x = torch.randn(rows, 130)
        torch.testing.assert_close(made.matmul(x), x @ made.dequantize().T)


@MADE
def test_products_have_gradients(part: type[Bitmap] | type[SparseGrid]) -> None:
    """The native kernel has none: where one is wanted, another way is taken."""
    made: Part = part.from_dense(*example(24, 130, dtype=torch.float32))
    x = torch.randn(3, 130, requires_grad=True)
    made.matmul(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], made.dequantize().sum(0))


@MADE
def test_projection_takes_new_values_on_the_same_support(part: type[Bitmap] | type[SparseGrid]) -> None:
    weight, keep = example(8, 64, dtype=torch.float32)
    target = torch.randn(8, 64).half().float()
    made: SupportPart = part.from_dense(weight, keep)
    found = made.project(target)
    assert torch.equal(found.mask(), keep)
    if isinstance(made, SparseGrid):
        steps = made.scales.float()
        inside = keep & (target.abs() < 7 * steps)
        assert bool(((found.dequantize() - target).abs() <= steps / 2 * 1.001)[inside].all())
    else:
        assert torch.equal(found.dequantize(), torch.where(keep, target, 0))
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
    grid = SparseGrid.from_dense(*example(4, 70))
    state = grid.state()
    half = state["values"].clone()
    odd = int(grid.mask()[0, :64].sum()) % 2
    assert odd or int(grid.mask()[0, 64:].sum()) % 2, "the example has a word of an odd count in its first row"
    end = (int(grid.mask()[0, :64].sum()) + 1) // 2 if odd else int(grid.offsets[1])
    half[end - 1] |= 0x10
    for name, buffer, message in (
        ("values", half, "half a byte behind the codes"),
        ("offsets", state["offsets"].roll(1), "row offsets are not those"),
        ("scales", torch.full_like(grid.scales, torch.inf), "scales have NaN or infinity"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SparseGrid.from_state(grid.spec(), {**state, name: buffer}).check()
    for changes, message in (
        ({"group_size": 96}, "'group_size' must be a multiple of 64, not 96"),
        ({"bytes": -1}, "'bytes' must be a count"),
        ({"group_size": 128}, r"buffer 'scales' is torch.bfloat16 \[4, 2\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SparseGrid.from_state({**grid.spec(), **changes}, state)


def test_what_cannot_be_stored_is_refused() -> None:
    weight, keep = example(4, 8, dtype=torch.float32)
    with pytest.raises(ConfigError, match="groups of 32 columns"):
        SparseGrid.from_dense(weight, keep, 32)
    with pytest.raises(NumericsError, match="infinite"):
        SparseGrid.from_dense(weight / 0, keep)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        SparseGrid.from_dense(weight / 0, keep, scales=torch.ones(4, 1).bfloat16())
    with pytest.raises(ConfigError, match="torch.float64"):
        Bitmap.from_dense(weight.double(), keep)
    with pytest.raises(ConfigError, match="bool mask"):
        Bitmap.from_dense(weight, keep.float())
    with pytest.raises(NumericsError, match="beyond torch.float16"):
        Bitmap.from_dense(weight * 1e6, torch.ones_like(keep), torch.float16)
