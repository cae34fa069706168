"""KVQuant: what is captured and learnt from calibration text, and what the cache does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import Kivi, Kvquant, _capture
from trimtab.cache._capture import Captured, captured_layers
from trimtab.cache._making import fit
from trimtab.cache._tables import channel_tables
from trimtab.cache.base import CacheMethod
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.segments import RopeSource, SegmentCache
from trimtab.models.segments.rope import rotated
from trimtab.tensors.kv.codec import KVCodec

from .conftest import calibration, divergence, feed, fitted, held, keys_and_values, same, store, tiny


def on_prose(method: CacheMethod, model: PreTrainedModel, text: CalibrationSet) -> SegmentCache:
    fit(method, model, text)
    return method.new(model)


# What is captured


def projected(model: PreTrainedModel, text: CalibrationSet, module: str) -> tuple[Tensor, Tensor]:
    """Output of a module of the second layer and the squared gradient of the loss there, [T, Hk, 32]."""
    found: list[Tensor] = []
    owner = model.get_submodule(f"model.layers.1.self_attn.{module}")
    hook = owner.register_forward_hook(lambda _m, _a, out: (out.retain_grad(), found.append(out))[1])
    try:
        model(input_ids=text.tokens, attention_mask=text.mask, labels=text.tokens, use_cache=False).loss.backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    (out,) = found
    assert out.grad is not None
    return tuple(x.detach().reshape(-1, 2, 32) for x in (out, out.grad.square()))  # type: ignore[return-value]


def capture_is_right(family: str) -> None:
    model, text = tiny(family), calibration()
    layer = list(captured_layers(model, text, fisher=True))[1]
    for module, x, fisher in (
        ("k_norm" if family == "qwen3" else "k_proj", layer.keys, layer.keys_fisher),
        ("v_proj", layer.values, layer.values_fisher),
    ):
        wanted, squared = projected(model, text, module)
        assert fisher is not None
        torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fisher, squared, atol=1e-4 * float(squared.max()), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_keys_and_their_gradients_are_those_before_rotary_embedding(family: str) -> None:
    """With biases and after the norm of keys, as they are quantized; undone from what attention sees."""
    capture_is_right(family)


def test_the_capture_check_notices_gradients_that_are_not_turned_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_capture, "rotated", lambda x, rope: x)
    with pytest.raises(AssertionError):
        capture_is_right("llama")


def test_layers_that_do_not_fit_at_once_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny(), calibration()
    whole = list(captured_layers(model, text, fisher=True))
    monkeypatch.setattr(_capture, "MAX_BYTES", 1)
    monkeypatch.setattr(_capture, "_BATCH_TOKENS", text.tokens.numel())
    for a, b in zip(whole, captured_layers(model, text, fisher=True), strict=True):
        assert a.layer == b.layer
        torch.testing.assert_close(a.keys, b.keys)
        assert a.keys_fisher is not None
        torch.testing.assert_close(a.keys_fisher, b.keys_fisher)


def test_padding_and_sinks_enter_no_statistic() -> None:
    model, text = tiny(), calibration()
    mask = text.mask.clone()
    mask[0, 40:] = False
    padded = CalibrationSet.from_tokens(text.tokens, mask)
    layer = next(iter(captured_layers(model, padded, fisher=False, skip_first=3)))
    assert len(layer.keys) == 11 * 61 + 37


def massive_first(layer: Captured) -> Captured:
    """As after a model whose first token is huge."""
    keys = layer.keys.clone()
    keys[::64] *= 1000
    return Captured(layer.layer, keys, layer.values, layer.keys_fisher, layer.values_fisher)


def test_a_first_token_that_is_kept_widens_no_range() -> None:
    model = tiny()
    for sinks, small in ((1, True), (0, False)):
        (layer, _) = captured_layers(model, calibration(), fisher=False)
        keys = massive_first(layer).keys
        if sinks:
            keys = keys.unflatten(0, (12, 64))[:, sinks:].flatten(0, 1)
        tables = channel_tables(keys, None, bits=3, outliers=0.01)
        assert (float(tables["upper"].max()) < 2 * float(layer.keys.max())) == small


# (6) sinks


@pytest.mark.usefixtures("no_gradients")
def test_the_first_tokens_stay_exact() -> None:
    (keys, values), model = keys_and_values(), tiny()
    for sinks in (0, 1, 5):
        cache = fitted(model, Kvquant(bits=2, sinks=sinks, fisher=False)).new(model)
        store(cache, keys, values, [100, 1, 99])
        found = held(cache)
        equal = [
            bool(torch.equal(a[:, i], b[0, :, i])) for a, b in zip(found, (keys, values), strict=True) for i in range(8)
        ]
        assert equal == ([True] * sinks + [False] * (8 - sinks)) * 2


# (4) outliers on other text


def share_of_outliers(cache: SegmentCache, sides: slice) -> float:
    """Among the encoded entries of all layers."""
    runs = [
        r for layer in cache.segment_layers for side in layer.groups[0].sides[sides] for r in side.runs[0] if r.bits
    ]
    return sum(len(r.outlier_values) for r in runs if r.outlier_values is not None) / sum(
        r.tokens * r.heads * r.head_dim for r in runs
    )


@pytest.mark.usefixtures("no_gradients")
def test_limits_hold_on_other_text(mini: PreTrainedModel, prose: Tensor, fit_text: CalibrationSet) -> None:
    """1 % of keys lie outside of the fixed limits; limits from 5 % are noticed."""
    found = {}
    for outliers in (0.01, 0.05):
        cache = on_prose(Kvquant(bits=3, outliers=outliers, fisher=False, uniform=True), mini, fit_text)
        feed(mini, cache, prose[:1], [320])
        found[outliers] = share_of_outliers(cache, slice(0, 1))
    assert found[0.01] == pytest.approx(0.01, abs=0.004)
    assert found[0.05] != pytest.approx(0.01, abs=0.004)


# (1) before rotary embedding


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_keys_are_stored_better_before_rotary_embedding(
    mini: PreTrainedModel, prose: Tensor, fit_text: CalibrationSet, bits: int
) -> None:
    """With tables learnt on one text, errors on another; without rotation there is no gap."""
    held_out = CalibrationSet.from_tokens(prose)
    ratios = []
    for train, test in zip(
        *(list(captured_layers(mini, text, fisher=False)) for text in (fit_text, held_out)), strict=True
    ):
        errors = []
        for turned in (False, True):
            fit_on = placed(mini, train, fit_text.length) if turned else train.keys
            x = placed(mini, test, 320) if turned else test.keys
            t = channel_tables(fit_on, None, bits=bits, outliers=0.0)
            codec = KVCodec(bits=bits, levels=t["levels"], scale=t["scale"], minimum=t["minimum"])
            x = x.transpose(0, 1)
            errors.append(float((decode(codec.encode(x[None])[0]) - x).norm() / x.norm()))
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 0.97


def placed(model: PreTrainedModel, layer: Captured, length: int) -> Tensor:
    """Keys after rotary embedding, of texts of this length."""
    rope = RopeSource(model, layer.layer).angles(torch.arange(length))
    texts = layer.keys.unflatten(0, (-1, length)).transpose(1, 2)
    return rotated(texts, rope).transpose(1, 2).flatten(0, 1)


# (7) a token alone


def changed_tokens(method: CacheMethod) -> set[int]:
    """Encoded tokens whose key or value is read otherwise once token 50 is another."""
    (keys, values), model = keys_and_values(), tiny()
    fitted(model, method)
    found = []
    for factor in (1.0, 2.5):
        k, v = keys[:1].clone(), values[:1].clone()
        k[:, :, 50] *= factor
        v[:, :, 50] *= factor
        cache = method.new(model)
        store(cache, k, v, [200])
        found.append(held(cache))
    differ = torch.stack([(a != b).any(2).any(0) for a, b in zip(*found, strict=True)]).any(0)
    return set(differ.nonzero().flatten().tolist())


@pytest.mark.usefixtures("no_gradients")
def test_a_token_is_encoded_on_its_own() -> None:
    assert changed_tokens(Kvquant(bits=3, sinks=2)) == {50}


@pytest.mark.usefixtures("no_gradients")
def test_the_check_of_tokens_notices_ranges_over_several() -> None:
    assert changed_tokens(Kivi(bits=2, group_size=16, window=32)) >= set(range(48, 64))


# What is learnt


@pytest.mark.parametrize("outliers", [0.0, 0.01])
def test_tables_are_what_the_paper_says(outliers: float) -> None:
    model = tiny()
    method = Kvquant(bits=3, outliers=outliers, sinks=0)
    learnt = fit(method, model, calibration())
    for layer in captured_layers(model, calibration(), fisher=False):
        own = {name.rpartition(".")[2]: t for name, t in learnt.items() if name.startswith(f"keys.{layer.layer}.")}
        limits = torch.tensor([outliers / 2, 1 - outliers / 2])
        lower, upper = torch.quantile(layer.keys, limits, dim=0, interpolation="nearest")
        torch.testing.assert_close(own["lower"], lower, atol=0.05, rtol=0.05)
        torch.testing.assert_close(own["upper"], upper, atol=0.05, rtol=0.05)
        assert torch.equal(own["minimum"][:, 0], ((own["upper"] + own["lower"]) / 2).half())
        assert torch.equal(own["scale"][:, 0], ((own["upper"] - own["lower"]) / 2).half())
        assert own["levels"].shape == (8,)
        assert bool((own["levels"].diff() > 0).all())
        assert float(own["levels"].abs().max()) <= 1.01


def test_weights_are_fisher_times_the_square_of_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 7; the official code's weights, F alone, are another option."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "trimtab.cache._tables.fit_levels", lambda x, bits, w: (seen.append(w), torch.linspace(-1, 1, 1 << bits))[1]
    )
    x, fisher = torch.randn(500, 2, 8), torch.rand(500, 2, 8)
    x[..., 3] *= 10
    tables: list[dict[str, Any]] = [
        channel_tables(x, fisher, bits=2, outliers=0.0, weight_by_scale=by_scale) for by_scale in (True, False)
    ]
    scale = tables[0]["scale"][:, 0].float()
    for weights, wanted in zip(seen, (fisher * scale.square(), fisher), strict=True):
        limit = wanted.flatten().sort().values[-9]
        common = wanted.flatten() < limit
        torch.testing.assert_close(weights[common], wanted.flatten()[common])
        assert float(weights.max()) <= float(limit) * 1.2


@pytest.mark.usefixtures("no_gradients")
def test_q_norm_is_for_two_bits_and_changes_no_code() -> None:
    (keys, values), model = keys_and_values(), tiny()
    caches = {}
    for normed in (None, True, False):
        cache = fitted(model, Kvquant(bits=2, q_norm=normed, fisher=False)).new(model)
        store(cache, keys, values, [200])
        caches[normed] = cache
    runs = {n: c.segment_layers[0].groups[0].keys.runs[0][-1] for n, c in caches.items()}
    assert same(held(caches[None]), held(caches[True]))
    assert not same(held(caches[None]), held(caches[False]))
    assert torch.equal(runs[True].codes, runs[False].codes)
    three = [fitted(model, Kvquant(bits=3, q_norm=normed, fisher=False)).new(model) for normed in (None, False)]
    for cache in three:
        store(cache, keys, values, [200])
    assert same(held(three[0]), held(three[1]))


@pytest.mark.usefixtures("no_gradients")
def test_learnt_levels_and_sinks_help(mini: PreTrainedModel, prose: Tensor, fit_text: CalibrationSet) -> None:
    """At 2 bits on a trained model: uniform levels are worse, and so is a first token like all others."""
    ids = prose[:2, :256]
    wanted = mini(ids, use_cache=False).logits[:, 160:]
    found = {}
    for name, options in {"paper": {}, "uniform": {"uniform": True}, "no sinks": {"sinks": 0}}.items():
        with torch.enable_grad():
            cache = on_prose(Kvquant(bits=2, **options), mini, fit_text)
        found[name] = divergence(wanted, feed(mini, cache, ids, [160, 48, 48])[:, 160:])
    assert found["paper"] < found["uniform"]
    assert found["paper"] < found["no sinks"]
