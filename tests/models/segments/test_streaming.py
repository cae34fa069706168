"""StreamingLLM's invariants, windows that hold different tokens per head, and log-weights of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.random import random_model
from trimtab.models.segments import CachePlan, HeadPlan, SegmentCache, TensorPlan

from .plans import EXACT, eager_twin, exact, feed, kivi, new_cache, tokens

SINKS, RECENT = 2, 6


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_before_anything_is_evicted_it_is_the_full_cache(family: str) -> None:
    model, ids = random_model(family), tokens(2, SINKS + RECENT)
    wanted = eager_twin(family)(ids).logits
    found = feed(model, new_cache(model, "streaming"), ids, [3, 1, 1, 3])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def recomputed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last token of [first sinks, last recent, that token], from scratch."""
    kept = torch.cat([ids[:, :SINKS], ids[:, -RECENT - 1 :]], dim=1)
    return model(kept, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_one_layer_is_recomputation_and_two_are_not(layers: int, padded: bool) -> None:
    model = random_model("llama", num_hidden_layers=layers)
    ids, pad = tokens(2, 40), 5 if padded else 0
    cache = new_cache(model, "streaming")
    mask = torch.ones((2, 40 + pad), dtype=torch.long)
    mask[0, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = torch.cat([torch.full((2, pad), 3), ids], dim=1)
    if padded:  # the second row has a longer text
        given[1] = tokens(1, 45, seed=9)
        texts = [given[0:1, pad:], given[1:2]]
    else:
        texts = [given[0:1], given[1:2]]
    found = feed(model, cache, given, [8, *[1] * (32 + pad)], attention_mask=mask, position_ids=positions)[:, -1]
    wanted = torch.cat([recomputed(model, text) for text in texts])
    close = torch.allclose(found, wanted, atol=2e-5, rtol=1e-4)
    assert close == (layers == 1)


def test_logits_do_not_depend_on_how_much_was_evicted_and_bytes_stay() -> None:
    model = random_model("llama", num_hidden_layers=1)
    found, sizes = [], set()
    for length in (30, 90, 150):  # far beyond the 128 positions that the model has
        cache = new_cache(model, "streaming")
        text = torch.cat([tokens(1, 2), tokens(1, length, seed=2), tokens(1, 9, seed=3)], dim=1)
        found.append(feed(model, cache, text, [10, *[1] * (text.shape[1] - 10)])[:, -1])
        sizes.add(cache.nbytes())
        assert cache.tokens == SINKS + RECENT
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[2], atol=2e-5, rtol=1e-4)
    assert len(sizes) == 1


def test_what_was_evicted_is_gone() -> None:
    model = random_model("llama", num_hidden_layers=1)
    text = tokens(1, 40)
    other = text.clone()
    other[:, 10:20] = tokens(1, 10, seed=8)
    last = [feed(model, new_cache(model, "streaming"), t, [5, *[1] * 35])[:, -1] for t in (text, other)]
    assert torch.equal(last[0], last[1])


def mixed(model: PreTrainedModel, recent: int) -> CachePlan:
    """KV head 0 keeps everything, KV head 1 sinks and recent tokens, at positions of the text."""
    keep = TensorPlan(codec=EXACT, block=16)
    layer = (
        HeadPlan(heads=(0,), keys=keep, values=keep),
        HeadPlan(heads=(1,), keys=keep, values=keep, sinks=SINKS, recent=recent),
    )
    return CachePlan((layer,) * model.config.num_hidden_layers, name="test")


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("recent", [10, 30])
def test_heads_may_hold_different_tokens(family: str, recent: int) -> None:
    """One layer: attention with a mask for each head, written out; sliding windows included."""
    model = random_model(family, num_hidden_layers=1)
    ids = tokens(1, 60)
    found = feed(model, SegmentCache(model, mixed(model, recent)), ids, [5, *[1] * 55])[:, -1]
    key, query = torch.arange(60), 59
    window = model.config.sliding_window if family == "mistral" else 60
    full = key > query - window
    streaming = full & ((key < SINKS) | (key > query - recent - 1))
    wanted = with_head_masks(model, ids, torch.stack([full, full, streaming, streaming]))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def with_head_masks(model: PreTrainedModel, ids: Tensor, seen: Tensor) -> Tensor:
    """Logits of the last token where its query head h sees the keys seen[h]."""
    n = ids.shape[1]
    mask = torch.ones((4, n, n), dtype=torch.bool).tril()
    mask[:, -1] &= seen
    model.set_attn_implementation("eager")
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None]
    return model(ids, attention_mask=additive, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("sizes", [[1], [5], [70]])
def test_key_bias_is_added_to_scores(family: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of log(2) on a key is that key twice; -inf hides it; in decoding, drafts and many queries alike."""
    model = random_model(family, num_hidden_layers=1, sliding_window=None) if family != "gemma2" else None
    model = model or random_model(family, num_hidden_layers=1, layer_types=["full_attention"])
    ids, after = tokens(1, 30), tokens(1, sizes[0], seed=2)
    for plan in (exact, kivi):
        cache = SegmentCache(model, plan(model))
        feed(model, cache, ids, [30])
        hidden = cache.fork()
        hidden.key_bias = {0: torch.zeros(1, 4, 20)}
        hidden.key_bias[0][..., 7] = -torch.inf
        mask = torch.ones((1, 1, sizes[0], 30 + sizes[0]), dtype=torch.bool).tril(30)
        mask[..., 7] = False
        found = model(after, past_key_values=hidden).logits
        assert not torch.allclose(found, model(after, past_key_values=cache.fork()).logits, atol=1e-3)
        model.set_attn_implementation("eager")
        twin = cache.fork()
        additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        wanted = model(after, past_key_values=twin, attention_mask=additive).logits
        model.set_attn_implementation("trimtab")
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-4)


def test_key_bias_in_a_prompt() -> None:
    model, ids = random_model("llama", num_hidden_layers=1), tokens(2, 20)
    mask = torch.ones((2, 20), dtype=torch.long)
    mask[1, :4] = 0
    cache = new_cache(model)
    cache.key_bias = {0: torch.zeros(2, 4, 6)}
    cache.key_bias[0][..., 3] = -30.0
    found = model(ids, past_key_values=cache, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    shown = torch.where(torch.ones((20, 20)).tril() * mask[:, None, None] > 0, 0.0, torch.finfo(torch.float32).min)
    shown[0, ..., 3] -= 30.0
    shown[1, ..., 7] -= 30.0
    wanted = model(ids, attention_mask=shown.clamp(min=torch.finfo(torch.float32).min), use_cache=False).logits
    torch.testing.assert_close(found[:, 4:], wanted[:, 4:], atol=2e-5, rtol=1e-4)
