"""RotateKV: rotation and order are undone, the order is that of the signed sums, massive activations stay exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import RotateKV
from trimtab.cache import rotatekv as module
from trimtab.cache._capture import captured_layers
from trimtab.cache._making import fit
from trimtab.kernels.kv_attention import reference
from trimtab.models.segments import RopeSource, SegmentCache, group
from trimtab.models.segments.rope import rotated, unrotated

from .conftest import calibration, divergence, feed, fitted, held, keys_and_values, new_cache, store, tiny, tokens

MANY = {"bits": 8, "group_size": 16, "heads_per_rotation": 2}


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, normalised."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


# (1) many bits: everything is undone


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "phi3"])
def test_at_eight_bits_it_is_nearly_the_identity(family: str) -> None:
    """Grouped heads, biases, norms of keys, partly rotated heads."""
    model, ids = tiny(family), tokens(2, 180)
    found = feed(model, new_cache(model, "rotatekv", MANY), ids, [120, 1, 59])
    assert divergence(model(ids).logits, found) < 2e-5


@pytest.mark.usefixtures("no_gradients")
def test_the_identity_check_notices_an_order_that_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.decode

    def unsorted(run: Any, *args: Any) -> Tensor:
        order = None if run.order is None else torch.arange(len(run.order), dtype=torch.int16)
        return right(dataclasses.replace(run, order=order), *args)

    monkeypatch.setattr("trimtab.models.segments.dense.decode", unsorted)
    model, ids = tiny(), tokens(2, 200)
    found = feed(model, new_cache(model, "rotatekv", MANY), ids, [120, 80])
    assert divergence(model(ids).logits, found) > 1e-3


# (2) the order


def wanted_order(keys: Tensor, how: str) -> list[int]:
    """keys [T, H, d] before rotary embedding, rotated over both heads of 32."""
    flat = keys.flatten(1).double()
    turned = flat @ hadamard(64).double()
    sums = {"paper": turned.sum(0), "by size": turned.abs().sum(0), "before the rotation": flat.sum(0)}[how]
    return sums.argsort().tolist()


def test_the_order_is_that_of_signed_sums_of_rotated_keys() -> None:
    model = tiny()
    learnt = fit(RotateKV(**MANY), model, calibration())
    for layer in captured_layers(model, calibration(), fisher=False):
        found = learnt[f"order.{layer.layer}"]
        assert found.dtype == torch.int16
        assert found.tolist() == wanted_order(layer.keys, "paper")
        assert found.tolist() != wanted_order(layer.keys, "by size")
        assert found.tolist() != wanted_order(layer.keys, "before the rotation")


@pytest.mark.usefixtures("no_gradients")
def test_the_order_helps_where_channels_have_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys with a few large channels, the same for all tokens: sorted groups err less, sorted by size less so."""
    model, method = tiny(), RotateKV(bits=2, group_size=16, heads_per_rotation=2, pivots=0)
    (keys, values), generator = keys_and_values(), torch.Generator().manual_seed(0)
    mean = torch.randn(1, 2, 1, 32, generator=generator)
    mean[..., [3, 20]] *= 6
    rope = RopeSource(model, 0).angles(torch.arange(200))
    plain = unrotated(keys[:1], rope) * 0.3 + mean
    keys = rotated(plain, rope)
    tables = dict(fit(method, model, calibration()))
    text = plain[0].transpose(0, 1)
    errors = {}
    for how in ("paper", "by size", "none"):
        order = list(range(64)) if how == "none" else wanted_order(text, how)
        tables["order.0"] = torch.tensor(order, dtype=torch.int16)
        monkeypatch.setattr("trimtab.cache._making.fit", lambda *_: tables)
        cache = method.new(model)
        store(cache, keys, values[:1], [192, 8])
        errors[how] = float((held(cache)[0] - keys[0]).norm() / keys.norm())
    assert errors["paper"] < 0.95 * errors["by size"]
    assert errors["paper"] < 0.9 * errors["none"]


def test_fewer_heads_are_rotated_where_four_do_not_fit() -> None:
    """The most that divide the layer's KV heads and make a power of two."""
    sizes = {heads: RotateKV(heads_per_rotation=4)._rotation(heads, 32) // 32 for heads in (1, 2, 4, 5, 6, 8, 12)}
    assert sizes == {1: 1, 2: 2, 4: 4, 5: 1, 6: 2, 8: 4, 12: 4}
    assert RotateKV(heads_per_rotation=3)._rotation(6, 32) == 2 * 32


@pytest.mark.usefixtures("no_gradients")
def test_the_clip_is_the_papers_for_the_number_of_bits() -> None:
    model = tiny()
    for bits, clip in ((2, 0.8), (3, 1.0), (4, 1.0)):
        plan = new_cache(model, "rotatekv", {"bits": bits}).plan.layers[0][0]
        assert plan.keys.codec.clip == plan.values.codec.clip == clip  # type: ignore[attr-defined]
    assert module.BLOCK_TOKENS == 32


# (5) pivots

MASSIVE, PLACE = -300.0, 77


def planted(after_layer: int) -> PreTrainedModel:
    """A model with three layers, in which the token at PLACE gets a massive activation at the end of a layer."""
    model = tiny(num_hidden_layers=3)

    def plant(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > PLACE:
            hidden[:, PLACE, 11] = MASSIVE
        return output

    model.model.layers[after_layer].register_forward_hook(plant)
    return model


def pivots(model: PreTrainedModel, count: int = 1) -> list[set[int]]:
    """Tokens of the first row that each layer keeps exactly."""
    cache = fitted(model, RotateKV(group_size=16, heads_per_rotation=2, pivots=count)).new(model)
    feed(model, cache, tokens(2, 120), [120])
    found = [layer.groups[0].pivots[0] for layer in cache.segment_layers]
    return [set(own.tolist()) for own in found if own is not None]


def detection_is_right() -> bool:
    """A planted massive activation is found in every layer after it appears, and not before; the first token always."""
    return all(
        [PLACE in own for own in pivots(planted(layer))] == [i > layer for i in range(3)]
        and all(0 in own and len(own) <= 2 for own in pivots(planted(layer)))
        for layer in (0, 1)
    )


@pytest.mark.usefixtures("no_gradients")
def test_massive_activations_are_found_in_every_layer_after_they_appear() -> None:
    assert detection_is_right()


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("broken", ["signed", "the first layer's"])
def test_the_check_of_pivots_notices_another_detector(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def signed(hidden: Tensor, count: int) -> Tensor:
        return torch.unique(hidden.flatten().topk(count).indices // hidden.shape[-1])

    def of_the_first_layer(self: SegmentCache, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            for each in self.segment_layers:
                each.note_inputs(hidden)

    if broken == "signed":
        monkeypatch.setattr(group, "pivot_tokens", signed)
    else:
        monkeypatch.setattr(SegmentCache, "note_inputs", of_the_first_layer)
    assert not detection_is_right()


@pytest.mark.usefixtures("no_gradients")
def test_pivots_are_read_exactly_and_spoil_nothing() -> None:
    (keys, values), model = keys_and_values(), tiny()
    cache, without = (new_cache(model, "rotatekv", {"group_size": 32, "pivots": count}) for count in (1, 0))
    keys, values = keys[:1].clone(), values[:1].clone()
    keys[:, :, PLACE] *= 100
    hidden = torch.zeros(1, 150, 8)
    hidden[0, PLACE, 3] = MASSIVE
    for each in (cache, without):
        layer = each.segment_layers[0]
        k, _ = layer.update(keys[:, :, :150], values[:, :, :150])
        layer.note_inputs(hidden)
        layer.attend(k.repeat_interleave(2, 1), None, None, 1.0, None, None)
    for x, found in zip((keys, values), held(cache), strict=True):
        assert torch.equal(found[:, PLACE], x[0, :, PLACE])
        assert torch.equal(found[:, 0], x[0, :, 0])
        assert not torch.equal(found[:, 1], x[0, :, 1])
    assert not torch.equal(held(without)[0][:, PLACE], keys[0, :, PLACE])


@pytest.mark.usefixtures("no_gradients")
def test_generated_tokens_are_no_pivots() -> None:
    model = tiny()
    cache = new_cache(model, "rotatekv", {"group_size": 32, "pivots": 3})
    feed(model, cache, tokens(1, 40), [40])
    before = [layer.groups[0].pivots[0].clone() for layer in cache.segment_layers]  # type: ignore[union-attr]
    feed(model, cache, tokens(1, 60, seed=2), [1, 59])
    after = [layer.groups[0].pivots[0] for layer in cache.segment_layers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b is not None)


@pytest.mark.usefixtures("no_gradients")
def test_protecting_what_is_massive_helps_more_than_random_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values at PLACE are large and most queries look there, as at a sink: the error of attention's output."""
    (keys, values), model = keys_and_values(), tiny()
    keys, values = keys[:1, :, :160].clone(), values[:1, :, :160].clone()
    values[:, :, PLACE] *= 10
    keys[:, :, PLACE] *= 3
    query = keys[:, :, PLACE : PLACE + 1].repeat_interleave(2, 1) * 0.05
    hidden = torch.zeros(1, 150, 8)
    hidden[0, PLACE, 3] = MASSIVE
    right, generator = group.pivot_tokens, torch.Generator().manual_seed(0)

    def output(name: str, options: dict[str, Any]) -> Tensor:
        cache = new_cache(model, name, options)
        layer = cache.segment_layers[0]
        for begin, end in [(0, 150), (150, 159), (159, 160)]:
            if begin == 0:
                layer.note_inputs(hidden)
            layer.update(keys[:, :, begin:end], values[:, :, begin:end])
            out = layer.attend(query.expand(-1, -1, end - begin, -1), None, None, 1.0, None, None)
        return out[:, :, -1]

    exact, errors = output("exact", {}), {}
    for name, detector in (
        ("paper", right),
        ("random", lambda h, n: torch.randperm(len(h), generator=generator)[:n].sort().values),
    ):
        monkeypatch.setattr(group, "pivot_tokens", detector)
        found = output("rotatekv", {"group_size": 32, "heads_per_rotation": 2, "pivots": 1 if name == "paper" else 20})
        errors[name] = float((found - exact).norm() / exact.norm())
    assert errors["paper"] < 0.7 * errors["random"]
