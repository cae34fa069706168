"""Rotations are orthogonal at every size, spread outliers, and never change once written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.rotation import Rotation, _hadamard

BASES = [1, 2, 4, 12, 20, 24, 28, 36, 44, 48, 60, 68, 76, 108, 148]
WHOLE = [1, 2, 8, 12, 20, 40, 64, 96, 128, 256, 304, 448, 704, 768, 896]
BLOCKED = {704 + 64: 768, 11008: 256, 65: 1, 6: 2, 92: 4, 1376: 32}


@pytest.mark.parametrize("order", BASES)
def test_base_matrices_are_hadamard(order: int) -> None:
    h = _hadamard(order)
    assert h.shape == (order, order)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    assert np.array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("size", WHOLE)
@pytest.mark.parametrize("seed", [None, 0, 12345])
def test_matrix_is_orthogonal_and_flat(size: int, seed: int | None) -> None:
    rotation = Rotation(size, seed)
    matrix = rotation.matrix(torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert rotation.block == size
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))
    stored = rotation.matrix().double()
    assert float((stored @ stored.t() - torch.eye(size)).abs().max()) < 1e-6


@pytest.mark.parametrize(("size", "block"), BLOCKED.items())
def test_other_sizes_mix_blocks(size: int, block: int) -> None:
    rotation = Rotation(size, 3)
    assert rotation.block == block
    unit = torch.zeros(size)
    unit[size // 2] = 1
    reached = rotation.apply(unit)
    assert int((reached != 0).sum()) == block
    torch.testing.assert_close(rotation.inverse(reached), unit)


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(0, 2**63 - 1)), st.integers(0, 2**31))
@settings(max_examples=60)
def test_every_size_preserves_norms_and_products(size: int, seed: int | None, data_seed: int) -> None:
    rotation = Rotation(size, seed)
    x, y = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(data_seed), dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x) @ rotation.apply(y).t(), x @ y.t())
    torch.testing.assert_close(rotation.inverse(rotation.apply(x)), x)
    torch.testing.assert_close(rotation.apply(rotation.inverse(x)), x)
    torch.testing.assert_close(rotation.apply(x), x @ rotation.matrix(torch.float64).t())


def test_float32_round_trip() -> None:
    x = torch.randn(5, 704)
    rotation = Rotation(704, 1)
    torch.testing.assert_close(rotation.inverse(rotation.apply(x)), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_round_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 256).to(dtype)
    rotation = Rotation(256, 1)
    got = rotation.apply(x)
    assert got.dtype == dtype
    assert torch.equal(got, rotation.apply(x.float()).to(dtype))


def test_outliers_are_spread() -> None:
    x = torch.randn(64, 704)
    x[:, 17] *= 100
    flat = Rotation(704, 0).apply(x)
    assert float(x.abs().amax() / x.square().mean().sqrt()) > 20
    assert float(flat.abs().amax() / flat.square().mean().sqrt()) < 12


def test_seeds_differ_and_signs_are_balanced() -> None:
    signs = torch.stack([Rotation(2048, seed).matrix()[0].sign() for seed in range(4)])
    assert float(signs.mean().abs()) < 0.05
    agreement = signs @ signs.t() / 2048
    assert float((agreement - torch.eye(4)).abs().max()) < 0.1


def test_written_rotations_never_change() -> None:
    """Checkpoints hold seed and size only, so these values are part of the format."""
    first_row = (Rotation(16, 7).matrix() * 4).round().int()[0].tolist()
    assert first_row == [1, 1, -1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1]
    assert Rotation.from_state(Rotation(16, 7).spec(), {}) == Rotation(16, 7)
    assert Rotation.from_state(Rotation(16, None).spec(), {}) == Rotation(16, None)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="size 0"):
        Rotation(0)
    with pytest.raises(ConfigError, match="seed -1"):
        Rotation(4, -1)
    with pytest.raises(ConfigError, match=r"size 4 .* \[2, 5\]"):
        Rotation(4).apply(torch.zeros(2, 5))
    for spec in (
        {},
        {"kind": "givens", "size": 4, "seed": 0},
        {"kind": "hadamard", "size": "4", "seed": 0},
        {"kind": "hadamard", "size": 0, "seed": 0},
    ):
        with pytest.raises(CheckpointError):
            Rotation.from_state(spec, {})
