"""GGUF blocks: published values, two independent readers (ours in readers.py, the package gguf), and exactness."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st

from trimtab.models.exports.gguf_blocks import TYPES
from trimtab.models.exports.gguf_exact import exact_blocks, smallest_exact
from trimtab.models.exports.gguf_projection import project_blocks
from trimtab.tensors.grid import GridFormat, GroupGrid

from .readers import TYPE_OF, gguf_weight


def gaussian(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def grid_of(weight: torch.Tensor, **fmt: object) -> GroupGrid:
    return GroupGrid.quantize(weight, GridFormat.from_options(fmt))


def read_back(data: torch.Tensor, name: str, shape: tuple[int, int]) -> np.ndarray:  # type: ignore[type-arg]
    """What our reader finds; the package gguf must find the same in float32."""
    found = gguf_weight(TYPE_OF[name], shape, data.numpy().tobytes())
    kind = gguf.GGMLQuantizationType[name.upper().replace("_K", "_K")]
    np.testing.assert_allclose(quants.dequantize(data.numpy(), kind), found, rtol=3e-7, atol=1e-9)
    return found


def test_published_q4_0() -> None:
    blocks = project_blocks(torch.linspace(-1, 0.9, 32)[None], "q4_0")
    data = blocks.tobytes(1)[0].tolist()
    assert len(data) == 18
    assert np.frombuffer(bytes(data[:2]), "<f2")[0] == 0.125
    assert data[2] == 0x80  # element 0 is -1, the code 0; element 16 is near 0, the code 8


@pytest.mark.parametrize(("name", "published"), [("q4_0", 0.00737), ("q8_0", 2.85e-5)])
def test_published_errors(name: str, published: float) -> None:
    weight = gaussian(256, 1024)
    found = project_blocks(weight, name).values((256, 1024))
    assert float((found - weight).square().sum() / weight.square().sum()) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_plain_types_are_the_packages_bytes(name: str) -> None:
    """Zeros, halves that round away from zero and large values included."""
    weight = gaussian(16, 512) * torch.logspace(-3, 2, 16)[:, None]
    weight[3] = 0
    weight[5] = torch.arange(512) % 100 - 49.5
    weight[5, ::32] = 127  # d is 1, and all other codes of Q8_0 are halves
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = quants.quantize(weight.numpy(), kind)
    assert np.array_equal(project_blocks(weight, name).tobytes(16).numpy(), expected)


@pytest.mark.parametrize("name", sorted(TYPES))
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_what_is_written_is_what_values_says(name: str, spread: float) -> None:
    weight = gaussian(4, 768) * spread * torch.linspace(0.1, 1, 768)
    weight[1, :256] = 0
    weight[2, 300:330] = 0
    weight[3] = weight[3].abs()
    blocks = project_blocks(weight, name)
    found = read_back(blocks.tobytes(4), name, (4, 768))
    np.testing.assert_allclose(blocks.values((4, 768)).numpy(), found, rtol=3e-7, atol=1e-12)
    assert np.isfinite(found).all()
    assert (found[1, :256] == 0).all()


@pytest.mark.parametrize(
    ("name", "bound"),
    [("q2_k", 0.075), ("q3_k", 0.022), ("q4_k", 0.0055), ("q6_k", 3.2e-4), ("q4_1", 0.0063)],
)
def test_projection_errors(name: str, bound: float) -> None:
    """Relative squared errors on normal weights; a plain min-max range without search gives 0.11 for q2_k."""
    weight = gaussian(64, 1024, seed=3)
    found = project_blocks(weight, name).values((64, 1024))
    assert float((found - weight).square().sum() / weight.square().sum()) < bound


def test_projection_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.models.exports import gguf_projection

    weight = gaussian()
    whole = {name: project_blocks(weight, name).tobytes(8) for name in TYPES}
    monkeypatch.setattr(gguf_projection, "_AT_ONCE", 600)
    for name, data in whole.items():
        assert torch.equal(project_blocks(weight, name).tobytes(8), data)


SMALLEST = {
    # (bits, symmetric, group size): type
    (2, True, 32): "q4_0",
    (2, False, 256): "q2_k",
    (2, True, -1): "q2_k",
    (3, True, 64): "q4_0",
    (3, True, 256): "q3_k",
    (3, False, 256): "q4_0",
    (4, True, 32): "q4_0",
    (4, True, 64): "q4_0",
    (4, True, -1): "q4_0",
    (4, False, 32): "q4_1",
    (4, False, 128): "q4_1",
    (4, False, 256): "q4_k",
    (8, True, 32): "q8_0",
    (8, True, -1): "q8_0",
}


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SMALLEST)
def test_smallest_type_that_holds_a_grid(bits: int, symmetric: bool, group_size: int) -> None:
    grid = grid_of(gaussian(), bits=bits, symmetric=symmetric, group_size=group_size)
    blocks = smallest_exact(grid)
    assert blocks is not None
    assert blocks.type.name == SMALLEST[bits, symmetric, group_size]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64, 128, 256, -1]),
    seed=st.integers(0, 5),
)
def test_exact_blocks_are_the_grid(bits: int, symmetric: bool, group_size: int, seed: int) -> None:
    """Each type that accepts a grid gives its weights bit for bit; Q4_1 rounds its offset and nothing else."""
    grid = grid_of(gaussian(2, 512, seed), bits=bits, symmetric=symmetric, group_size=group_size)
    expected = grid.dequantize(torch.float64).numpy()
    for name in TYPES:
        blocks = exact_blocks(grid, name)
        if blocks is None:
            continue
        found = read_back(blocks.tobytes(2), name, (2, 512))
        if name == "q4_1" and not symmetric:
            step = np.abs(found - expected).reshape(2, -1, 32)
            assert np.allclose(step, step[:, :, :1], rtol=1e-4, atol=1e-9)  # one offset per block
            assert step.max() <= 2**-11 * np.abs(expected).max() * 1.01
        else:
            assert np.array_equal(found, expected), name


def test_codes_and_scales_of_the_plain_types_carry_over() -> None:
    """Symmetric 4 bits to Q4_0, asymmetric to Q4_1, symmetric 8 bits to Q8_0: the numbers themselves."""
    for name, fmt, header, shift in (
        ("q4_0", {"bits": 4, "symmetric": True}, 2, 0),
        ("q4_1", {"bits": 4, "symmetric": False}, 4, 0),
        ("q8_0", {"bits": 8, "symmetric": True}, 2, -128),
    ):
        grid = grid_of(gaussian(3, 96), group_size=32, **fmt)
        blocks = exact_blocks(grid, name)
        assert blocks is not None
        data = blocks.tobytes(3).numpy().reshape(9, -1)
        assert np.array_equal(data[:, :2].copy().view("<f2").reshape(3, 3), grid.scales.numpy())
        codes = grid.codes().numpy().reshape(9, 32).astype(int) + shift
        if name == "q8_0":
            assert np.array_equal(data[:, header:].view(np.int8), codes)
        else:
            assert np.array_equal(data[:, header:] & 15, codes[:, :16])
            assert np.array_equal(data[:, header:] >> 4, codes[:, 16:])


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        ({"bits": 8, "symmetric": False, "group_size": 32}, "code - zero needs nine bits"),
        ({"bits": 4, "group_size": 16}, "two groups in a block"),
        ({"bits": 4, "group_size": 48}, "a group ends inside a block"),
        ({"bits": 4, "group_size": 32, "scale_dtype": "float32"}, "the scale is no fp16 number"),
    ],
)
def test_grids_that_no_type_holds(fmt: dict[str, object], why: str) -> None:
    weight = gaussian(4, 768)
    weight[:, ::7] *= 3
    assert smallest_exact(grid_of(weight, **fmt)) is None, why


def test_an_asymmetric_grid_whose_steps_fit_goes_to_a_signed_type() -> None:
    """8 bits asymmetric fit Q8_0 where code - zero happens to stay within int8."""
    codes = torch.arange(64, dtype=torch.uint8)[None].repeat(2, 1) + 60
    fmt = GridFormat(bits=8, symmetric=False, group_size=32)
    zeros = torch.full((2, 2), 100, dtype=torch.uint8)
    grid = GroupGrid.from_codes(codes, torch.full((2, 2), 0.25, dtype=torch.float16), zeros, fmt)
    blocks = smallest_exact(grid)
    assert blocks is not None
    assert blocks.type.name == "q8_0"
    assert np.array_equal(read_back(blocks.tobytes(2), "q8_0", (2, 64)), grid.dequantize(torch.float64).numpy())
