"""The module that holds a compressed weight: same values after every move, helpful without a dense weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from trimtab.core.errors import CheckpointError
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.low_rank import LowRank
from trimtab.tensors.rotation import Rotation


@pytest.fixture
def layer() -> CompressedLinear:
    weight = torch.randn(24, 32)
    grid = GroupGrid.quantize(weight, GridFormat(bits=3, group_size=16, symmetric=False))
    factors = LowRank(torch.randn(24, 2).bfloat16(), torch.randn(2, 32).bfloat16())
    return CompressedLinear(CompressedTensor((grid, factors), Rotation(32, seed=5)), torch.randn(24))


def bits(layer: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (b.dtype, b.view(torch.uint8).numpy().tobytes()) for name, b in layer.named_buffers()}


def test_forward_is_the_tensors_product_and_the_bias(layer: CompressedLinear) -> None:
    x = torch.randn(2, 5, 32)
    assert layer.bias is not None
    assert torch.equal(layer(x), layer.tensor.matmul(x) + layer.bias)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias), atol=1e-4, rtol=1e-4)
    assert (layer.in_features, layer.out_features) == (32, 24)
    assert torch.equal(CompressedLinear(layer.tensor)(x), layer.tensor.matmul(x))


def test_state_holds_every_buffer_once(layer: CompressedLinear) -> None:
    names = ["part0_codes", "part0_scales", "part0_zeros", "part1_left", "part1_right"]
    assert sorted(layer.state_dict()) == ["bias", *names]
    assert sorted(layer.stored()) == names
    assert sum(b.numel() * b.element_size() for b in layer.stored().values()) == layer.tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_change_the_bias_only(layer: CompressedLinear, dtype: torch.dtype) -> None:
    before = bits(layer)
    layer.tensor  # noqa: B018  the cached tensor must not outlive the cast
    nn.Sequential(layer).to(dtype)
    assert bits(layer) == before
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(3, 32, dtype=dtype)).dtype == dtype


def test_half_and_back_changes_nothing(layer: CompressedLinear) -> None:
    before, x = bits(layer), torch.randn(3, 32)
    layer.bias = None
    expected = layer(x)
    layer.half().float().bfloat16().float()
    assert bits(layer) == before
    assert torch.equal(layer(x), expected)


def test_moves_to_another_device_keep_dtypes(layer: CompressedLinear) -> None:
    dtypes = {name: b.dtype for name, b in layer.named_buffers()}
    layer.to("meta", torch.bfloat16)
    assert all(b.is_meta for b in layer.buffers())
    assert {name: b.dtype for name, b in layer.named_buffers()} == dtypes
    layer.to_empty(device="cpu")
    assert layer.tensor.state()["0.codes"].device.type == "cpu"


def test_an_empty_layer_is_filled_by_a_state_dictionary(layer: CompressedLinear) -> None:
    for assign in (True, False):
        empty = CompressedLinear.empty(layer.spec, torch.zeros(24))
        assert all(b.is_meta for b in empty.buffers())
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        x = torch.randn(4, 32)
        assert torch.equal(empty(x), layer(x))


def test_an_exchanged_buffer_is_seen(layer: CompressedLinear) -> None:
    x = torch.randn(4, 32)
    before = layer(x)
    layer.part0_scales = layer.part0_scales * 2
    assert not torch.equal(layer(x), before)


def test_copies_are_independent(layer: CompressedLinear) -> None:
    x = torch.randn(4, 32)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other.part0_scales.zero_()
        assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


def test_there_is_no_dense_weight(layer: CompressedLinear) -> None:
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"no dense 'weight'; read an approximation with .dequantize()"):
        layer.weight  # noqa: B018
    with pytest.raises(AttributeError, match="'wieght'"):
        layer.wieght  # noqa: B018


def test_a_bad_spec_is_refused(layer: CompressedLinear) -> None:
    spec = copy.deepcopy(layer.spec)
    spec["parts"][0]["kind"] = "gird"
    with pytest.raises(CheckpointError, match="Did you mean 'grid'"):
        CompressedLinear.empty(spec)
