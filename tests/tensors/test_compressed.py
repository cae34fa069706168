"""The sum of parts under a transform behaves as the dense weight it stands for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.rotation import Rotation
from trimtab.tensors.sparse import SparseOutliers


def compress(weight: torch.Tensor, rank: int, fraction: float, rotated: bool, bits: int = 3) -> CompressedTensor:
    """Sparse, then grid, then the low-rank remainder, as far as asked for."""
    rotation = Rotation(weight.shape[1], 5) if rotated else None
    rest = weight if rotation is None else rotation.apply(weight)
    sparse = SparseOutliers.select(rest, fraction, dtype=torch.float32)
    grid = GroupGrid.quantize(rest - sparse.dequantize(), GridFormat.from_options({"bits": bits, "group_size": -1}))
    left = svd(rest - sparse.dequantize() - grid.dequantize(), rank)
    return CompressedTensor((grid, left, sparse), rotation)


@given(st.integers(1, 8), st.integers(1, 40), st.booleans(), st.floats(0, 0.3), st.integers(0, 2**31))
@settings(max_examples=25)
def test_interface_is_that_of_the_dense_weight(
    out_features: int, in_features: int, rotated: bool, fraction: float, seed: int
) -> None:
    torch.manual_seed(seed)
    tensor = compress(torch.randn(out_features, in_features), 1, fraction, rotated)
    assert tensor.shape == (out_features, in_features)
    x = torch.randn(2, 3, in_features)
    torch.testing.assert_close(tensor.matmul(x), x @ tensor.dequantize().t(), rtol=1e-4, atol=1e-4)
    assert tensor.matmul(x.bfloat16()).dtype == torch.bfloat16
    assert tensor.dequantize(torch.float16).dtype == torch.float16
    spec, state = json.loads(json.dumps(tensor.spec())), tensor.state()
    wanted = CompressedTensor.buffers(spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == wanted
    assert tensor.nbytes == sum(t.numel() * t.element_size() for t in state.values())
    back = CompressedTensor.from_state(spec, state)
    back.check()
    assert back.transform == tensor.transform
    assert torch.equal(back.dequantize(), tensor.dequantize())


def test_rebuilding_looks_at_no_values() -> None:
    """Loaders build the layer first and fill its buffers afterwards."""
    tensor = compress(torch.randn(4, 8), 2, 0.1, rotated=True)
    wanted = CompressedTensor.buffers(tensor.spec())
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in wanted.items()}
    back = CompressedTensor.from_state(tensor.spec(), empty)
    assert back.shape == (4, 8)
    assert back.nbytes == tensor.nbytes


def test_buffers_are_named_by_part() -> None:
    tensor = compress(torch.randn(4, 8), 2, 0.1, rotated=False)
    names = {"0.codes", "0.scales", "1.left", "1.right", "2.values", "2.columns", "2.offsets"}
    assert set(tensor.state()) == names


@pytest.mark.parametrize("rotated", [False, True])
def test_full_rank_remainder_restores_the_weight(rotated: bool) -> None:
    weight = torch.randn(12, 20)
    torch.testing.assert_close(compress(weight, 12, 0.1, rotated).dequantize(), weight, rtol=1e-4, atol=1e-5)


def test_each_part_and_the_rotation_lower_the_error() -> None:
    """Outliers in one column: rotation spreads them, sparse entries take them, low rank takes the rest."""
    weight = torch.randn(32, 64)
    weight[:, 3] *= 30

    def error(rank: int, fraction: float, rotated: bool) -> float:
        return float((compress(weight, rank, fraction, rotated).dequantize() - weight).square().sum())

    plain = error(0, 0, False)
    assert error(0, 0, True) < 0.5 * plain
    assert error(0, 0.02, False) < 0.5 * plain
    assert error(4, 0, False) < plain


def test_rotation_acts_on_the_input() -> None:
    part = LowRank(torch.randn(3, 2), torch.randn(2, 16))
    rotation = Rotation(16, 1)
    tensor = CompressedTensor((part,), rotation)
    torch.testing.assert_close(tensor.dequantize(), part.dequantize() @ rotation.matrix(), rtol=1e-5, atol=1e-5)


def test_refusals_name_the_shapes() -> None:
    a, b = svd(torch.randn(4, 6), 1), svd(torch.randn(4, 5), 1)
    with pytest.raises(ConfigError, match=r"low_rank \[4, 6\], low_rank \[4, 5\]"):
        CompressedTensor((a, b))
    with pytest.raises(ConfigError, match="at least one"):
        CompressedTensor(())
    with pytest.raises(ConfigError, match=r"to 8 entries .* \[4, 6\]"):
        CompressedTensor((a,), Rotation(8))
    with pytest.raises(ConfigError, match=r"\[2, 5\] .* \[4, 6\]"):
        CompressedTensor((a,)).matmul(torch.randn(2, 5))


def test_damaged_storage_is_refused() -> None:
    tensor = compress(torch.randn(4, 8), 2, 0.1, rotated=True)
    spec, state = tensor.spec(), tensor.state()
    with pytest.raises(CheckpointError, match="'parts'"):
        CompressedTensor.from_state({"parts": []}, {})
    with pytest.raises(CheckpointError, match="'parts'"):
        CompressedTensor.buffers({"parts": "grid"})
    for key in ("3.codes", "codes", "x.codes"):
        with pytest.raises(CheckpointError, match=f"'{key}'"):
            CompressedTensor.from_state(spec, state | {key: state["0.codes"]})
    with pytest.raises(CheckpointError, match="'scales' is missing"):
        CompressedTensor.from_state(spec, {k: v for k, v in state.items() if k != "0.scales"})
    with pytest.raises(CheckpointError, match="to 16 entries"):
        CompressedTensor.from_state(spec | {"transform": Rotation(16).spec()}, state)
    state["1.left"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match="'left'"):
        CompressedTensor.from_state(spec, state).check()
