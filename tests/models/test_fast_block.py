"""Blocks that decode in two native calls: the same model in every respect but speed."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

import trimtab as tt
from trimtab.kernels import library
from trimtab.kernels.block_step import MAX_ROWS, PreparedBlock
from trimtab.models import fast_block, random_model
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import svd
from trimtab.tensors.sparse import SparseOutliers
from trimtab.weights.magnitude import Magnitude

from .decoding import BLOCKS, blocks, decode, make, native_steps, plain, prompt, same

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there are no native kernels here")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return native_steps(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_those_of_the_modules(family: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = make(family, dtype)
    modules = plain(model)
    for rows in (1, 2, 3, MAX_ROWS):
        for padding in (0, 4):
            expected = decode(modules, rows, padding=padding)
            assert not calls
            same(decode(model, rows, padding=padding), expected)
            assert calls == [rows] * 3 * BLOCKS
            calls.clear()
    decode(model, MAX_ROWS + 1)
    assert not calls


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"value_bits": 4}], ids=["values", "codes"])
def test_pruned_blocks_decode_like_their_modules(family: str, options: dict[str, Any], calls: list[int]) -> None:
    model = tt.compress(random_model(family, dtype=torch.bfloat16), Magnitude(**options), progress=False)
    modules = plain(model)
    for rows in (1, 3, MAX_ROWS):
        expected = decode(modules, rows)
        assert not calls
        same(decode(model, rows), expected)
        assert calls == [rows] * 3 * BLOCKS
        calls.clear()


def test_a_few_tokens_of_each_row_go_together(calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    with torch.no_grad():
        for rows, length in ((1, 5), (2, 4)):
            ids = prompt(rows, length)
            expected = plain(model)(input_ids=ids).logits
            same(model(input_ids=ids).logits, expected)
            same(model(input_ids=ids, use_cache=False).logits, expected)
    assert calls == [5] * 4 + [8] * 4


def test_without_residual_or_with_another_norm_it_is_another_model(calls: list[int]) -> None:
    """What `same` lets pass is far smaller than what a mistake in a block changes."""
    model = make(dtype=torch.bfloat16)
    expected = decode(plain(model))
    blocks(model)[0].post_attention_layernorm.variance_epsilon *= 1e4
    with pytest.raises(AssertionError):
        same(decode(model), expected)
    blocks(model)[0].post_attention_layernorm.variance_epsilon /= 1e4
    same(decode(model), expected)
    after = PreparedBlock.after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedBlock, "after", lambda self, attended, x: after(self, attended, torch.zeros_like(x)))
        with pytest.raises(AssertionError):
            same(decode(model), expected)


METHODS = [None, tt.cache.Exact(), tt.cache.Streaming(window=8, sinks=2)]


@pytest.mark.parametrize("method", METHODS, ids=["static", "exact", "streaming"])
@pytest.mark.parametrize("padding", [0, 4])
def test_every_cache_sees_what_it_always_saw(method: Any, padding: int, calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    modules = plain(model)

    def cache(of: PreTrainedModel) -> Any:
        return StaticCache(config=of.config, max_cache_len=32) if method is None else method.new(of)

    expected = decode(modules, 3, 8, cache(modules), padding)
    calls.clear()
    same(decode(model, 3, 8, cache(model), padding), expected)
    assert calls == [3] * 8 * BLOCKS


def test_sliding_windows_are_kept(calls: list[int]) -> None:
    model = make("mistral", torch.float32)  # with a window of 24
    expected = decode(plain(model), 2, 18)
    same(decode(model, 2, 18), expected)
    assert len(calls) == 18 * BLOCKS


def _scale(layer: CompressedLinear) -> None:
    layer.part0_scales.mul_(2)


def _exchange(layer: CompressedLinear) -> None:
    layer.part0_scales = layer.part0_scales * 2


def _move(layer: CompressedLinear) -> None:
    layer.part0_scales.data = layer.part0_scales.data * 2


def _set(layer: CompressedLinear) -> None:
    state = {name: tensor.clone() for name, tensor in layer.tensor.state().items()}
    state["0.scales"] *= 2
    layer.set_tensor(CompressedTensor.from_state(layer.spec, state))


def _bias(layer: CompressedLinear) -> None:
    layer.bias = nn.Parameter(torch.ones(layer.out_features).bfloat16(), requires_grad=False)


@pytest.mark.parametrize("change", [_scale, _exchange, _move, _set, _bias])
def test_changed_layers_are_seen(change: Callable[[CompressedLinear], None], calls: list[int]) -> None:
    model = make()
    before = decode(model)
    layer = blocks(model)[1].mlp.down_proj
    change(layer)
    calls.clear()
    found = decode(model)
    assert calls == [1] * 3 * BLOCKS
    same(found, decode(plain(model)))
    assert not torch.equal(found, before)


def test_changed_norms_are_seen(calls: list[int]) -> None:
    model = make()
    norm = blocks(model)[1].input_layernorm
    expected = decode(model)
    for change in (
        lambda: norm.weight.data.mul_(-1),
        lambda: setattr(norm.weight, "data", norm.weight.data * -1),
        lambda: setattr(norm, "weight", nn.Parameter(norm.weight.detach() * -1)),
    ):
        change()
        found = decode(model)
        assert not torch.equal(found, expected)
        expected = decode(plain(model))
        same(found, expected)
    assert calls == [1] * 4 * 3 * BLOCKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_part_of_the_step(family: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = make(family, dtype, bits=2)
    before = decode(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear):
            generator = torch.Generator().manual_seed(len(name))
            error = (
                0.3 * layer.in_features**-0.5 * torch.randn(layer.out_features, layer.in_features, generator=generator)
            )
            kept = SparseOutliers.select(error, 0.02)
            low = svd(error - kept.dequantize(), 4, dtype=torch.bfloat16)
            parent, _, attribute = name.rpartition(".")
            other = CompressedLinear(CompressedTensor((*layer.tensor.parts, kept, low)), layer.bias)
            setattr(model.get_submodule(parent), attribute, other)
    calls.clear()
    found = decode(model, 3, padding=4)
    assert calls == [3] * 3 * BLOCKS
    same(found, decode(plain(model), 3, padding=4))
    assert not torch.equal(decode(model), before)
    blocks(model)[0].mlp.up_proj.part2_left.mul_(5)
    same(decode(model), decode(plain(model)))


def test_the_model_stays_what_it_was(tmp_path: object, calls: list[int]) -> None:
    model = make()
    raw = random_model("llama", dtype=torch.bfloat16)
    assert [type(block) for block in blocks(model)] == [type(block) for block in blocks(raw)]
    assert not [
        name for name in model.state_dict() if "layers.0" in name and "part0" not in name and "norm" not in name
    ]
    expected = decode(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        calls.clear()
        same(decode(other), expected)
        assert not calls, "copies are plain"
        fast_decoding(other)
        same(decode(other), expected)
        assert calls == [1] * 3 * BLOCKS
        blocks(other)[0].mlp.up_proj.part0_scales.mul_(2)
        assert not torch.equal(decode(other), decode(model))
    tt.save(model, f"{tmp_path}/saved")
    calls.clear()
    same(decode(tt.load(f"{tmp_path}/saved")), expected)
    assert calls == [1] * 3 * BLOCKS


def test_calling_it_again_changes_nothing(calls: list[int]) -> None:
    model = make()
    expected, forwards = decode(model), [block.forward for block in blocks(model)]
    fast_decoding(model)
    assert [block.forward for block in blocks(model)] == forwards
    blocks(model)[0].forward = own = lambda *args, **kwargs: type(blocks(model)[0]).forward(
        blocks(model)[0], *args, **kwargs
    )
    calls.clear()
    fast_decoding(model)
    assert blocks(model)[0].forward is own, "what somebody else has put there stays"
    same(decode(model), expected)
    assert calls == [1] * 3


def test_a_block_is_not_kept_alive() -> None:
    model = make()
    decode(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(blocks(model)[0])
        del model.model.layers[0]
        assert gone() is None
    finally:
        gc.enable()


def test_reasons_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_block, "_logged", set())
    model = make()
    for block in blocks(model):
        block.mlp.up_proj.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "trimtab.models"):
        decode(model)
        decode(model)
    told = [record.message for record in caplog.records if "two native calls" in record.message]
    assert len(told) == 1
    assert "a module inside has a hook" in told[0]
