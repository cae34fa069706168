"""Coupled Quantization: codebooks from calibration text, codes of single tokens, attention from tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.cache import Cq
from trimtab.cache._capture import Captured, captured_layers
from trimtab.cache._making import fit
from trimtab.cache.base import Fitted
from trimtab.kernels.kv_attention import Lane, kv_attention
from trimtab.kernels.kv_attention.codes import unpack_rows
from trimtab.models.info import info_of
from trimtab.models.segments import RopeSource
from trimtab.models.segments.rope import rotated, unrotated
from trimtab.tensors.kv import codebook as codebooks
from trimtab.tensors.kv.codebook import nearest_centroid

from .conftest import calibration, fitted, held, keys_and_values, same, store, tiny

SMALL = Cq(channels=4, bits=4, iterations=20)


def learnt(method: Cq) -> tuple[Fitted, list[Captured]]:
    """Codebooks for the random Llama, and what they were fitted to."""
    model = tiny()
    return fit(method, model, calibration()), list(captured_layers(model, calibration(), fisher=True))


def groups(x: Tensor, channels: int) -> Tensor:
    """[T, H, d] -> [H d / channels, T, channels]"""
    return x.flatten(1).unflatten(1, (-1, channels)).transpose(0, 1)


def errors(codebook: Tensor, x: Tensor, fisher: Tensor) -> tuple[float, float]:
    """Squared error, and that weighted by the gradients of each group."""
    points, table = groups(x, codebook.shape[-1]), codebook.flatten(0, 1).float()
    codes = nearest_centroid(points, table)
    off = (points - table.gather(1, codes[..., None].expand(-1, -1, points.shape[2]))).square().sum(-1)
    return float(off.sum()), float((off * groups(fisher, codebook.shape[-1]).sum(-1)).sum())


# What is learnt


def test_sensitive_tokens_get_the_centroids() -> None:
    """Summed over layers: with squared gradients the weighted error is lower and the plain one higher."""
    (by_fisher, layers), (plain, _) = learnt(SMALL), learnt(Cq(channels=4, bits=4, iterations=20, fisher=False))
    found = {"fisher": [0.0, 0.0], "plain": [0.0, 0.0]}
    for layer in layers:
        assert layer.values_fisher is not None
        for name, tables in (("fisher", by_fisher), ("plain", plain)):
            both = errors(tables[f"values.{layer.layer}"], layer.values, layer.values_fisher)
            found[name] = [a + b for a, b in zip(found[name], both, strict=True)]
    assert found["fisher"][1] < found["plain"][1]
    assert found["fisher"][0] > found["plain"][0]


def weights_used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    right = codebooks.fit_codebook

    def spy(points: Tensor, bits: int, weights: Tensor, **more: int) -> Tensor:
        seen.append(weights)
        return right(points, bits, weights, **more)

    monkeypatch.setattr("trimtab.cache.cq.fit_codebook", spy)
    return seen


def test_weights_are_the_squared_gradients_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = weights_used(monkeypatch)
    _, layers = learnt(Cq(channels=4, bits=4, iterations=1))
    wanted = [f for layer in layers for f in (layer.keys_fisher, layer.values_fisher)]
    for weights, fisher in zip(seen, wanted, strict=True):
        assert fisher is not None
        torch.testing.assert_close(weights, fisher.reshape(len(fisher), 16, 4).sum(-1).T)


def test_one_channel_has_a_table_of_its_own() -> None:
    """Stored in pairs: the codebook of a pair is all combinations of two tables of four levels."""
    tables, layers = learnt(Cq(channels=1, bits=2, fisher=False))
    for layer in layers:
        codebook = tables[f"keys.{layer.layer}"]
        assert codebook.shape == (2, 16, 16, 2)
        for head, pair in [(0, 0), (1, 7)]:
            first, second = (codebook[head, pair, :, i].unique() for i in range(2))
            assert len(first) == len(second) == 4
            x = layer.keys[:, head, 2 * pair]
            near = first.float()[(x[:, None] - first.float()).abs().argmin(1)]
            best = torch.stack([x[(x[:, None] - first.float()).abs().argmin(1) == i].mean() for i in range(4)])
            assert float((x - near).square().mean()) < 0.2 * float(x.var())
            torch.testing.assert_close(first.float(), best, atol=0.02, rtol=0.02)  # the means of what is nearest


# What is stored


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("method", [SMALL, Cq(channels=8, bits=9, iterations=2, fisher=False)], ids=["4c4b", "8c9b"])
def test_a_token_is_the_nearest_centroid_to_its_key_before_rotary_embedding(method: Cq) -> None:
    """By plain distance, whatever the codebook was weighted by, and independent of all other tokens."""
    (keys, values), model = keys_and_values(), tiny()
    cache = fitted(model, method).new(model)
    store(cache, keys[:1], values[:1], [120, 1, 79])
    rope, tables = RopeSource(model, 0).angles(torch.arange(200)), info_of(model).fitted_caches
    (books,) = tables.values()
    for x, name, found in zip((keys[0], values[0]), ("keys.0", "values.0"), held(cache), strict=True):
        plain = unrotated(x, rope) if name == "keys.0" else x
        points = plain.transpose(0, 1).unflatten(2, (-1, method.channels))  # [T, H, groups, c]
        distance = (points[:, :, :, None] - books[name].float()[None]).square().sum(-1)
        wanted = (
            books[name]
            .float()[torch.arange(2)[:, None], torch.arange(32 // method.channels), distance.argmin(-1)]
            .flatten(2)
            .transpose(0, 1)
        )
        wanted = rotated(wanted, rope) if name == "keys.0" else wanted
        close = (found[:, :192] - wanted[:, :192]).abs().amax(-1) < 1e-4
        assert float(close.float().mean()) > 0.995  # ties
        assert torch.equal(found[:, 192:], x[:, 192:])


@pytest.mark.usefixtures("no_gradients")
def test_the_window_is_exact() -> None:
    (keys, values), model = keys_and_values(), tiny()
    for window in (0, 40):
        cache = fitted(model, Cq(channels=4, bits=4, iterations=20, window=window)).new(model)
        store(cache, keys[:1], values[:1], [150, 50])
        group = cache.segment_layers[0].groups[0]
        assert [side.encoded[0] for side in group.sides] == [(200 - window) // 32 * 32] * 2
    assert len(info_of(model).fitted_caches) == 1  # the window needs no codebooks of its own


@pytest.mark.usefixtures("no_gradients")
def test_attention_from_tables_is_attention_to_what_is_decoded() -> None:
    """o_g = sum over codes of centroid x (sum of p of the tokens with that code), sheet 4."""
    (keys, values), model = keys_and_values(), tiny()
    cache = fitted(model, SMALL).new(model)
    store(cache, keys[:1, :, :192], values[:1, :, :192], [192])
    layer = cache.segment_layers[0]
    lane = layer.groups[0].lane(0, (0, 1))
    (run,) = lane.values
    assert run.codes is not None
    assert run.codebook is not None
    rope = RopeSource(model, 0).table(192, torch.device("cpu"))
    query = torch.randn(1, 4, 1, 32)
    found, _ = kv_attention(query, [lane], scale=0.3, rope=rope)
    dense_keys, dense_values = held(cache)
    p = (torch.einsum("hd,hnd->hn", query[0, :, 0], dense_keys.repeat_interleave(2, 0)) * 0.3).softmax(-1)
    codes = unpack_rows(run.codes, 4, 192).transpose(1, 2).long()  # [H, groups, tokens]
    mass = torch.zeros(4, 8, 16).scatter_add_(2, codes.repeat_interleave(2, 0), p[:, None].expand(-1, 8, -1))
    by_tables = torch.einsum("hgk,hgkc->hgc", mass, run.codebook.float().repeat_interleave(2, 0)).flatten(1)
    torch.testing.assert_close(found[0, :, 0], by_tables, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        by_tables, torch.einsum("hn,hnd->hd", p, dense_values.repeat_interleave(2, 0)), atol=1e-5, rtol=1e-4
    )
    assert isinstance(lane, Lane)


@pytest.mark.usefixtures("no_gradients")
def test_codes_do_not_depend_on_other_tokens() -> None:
    (keys, values), model = keys_and_values(), tiny()
    cache, other = fitted(model, SMALL).new(model), SMALL.new(model)
    store(cache, keys[:1], values[:1], [200])
    k, v = keys[:1].clone(), values[:1].clone()
    k[:, :, 50:60], v[:, :, 50:60] = 30.0, -30.0
    store(other, k, v, [200])
    kept = torch.ones(200, dtype=torch.bool)
    kept[50:60] = False
    assert same([x[:, kept] for x in held(cache)], [x[:, kept] for x in held(other)])
    assert not same(held(cache), held(other))
