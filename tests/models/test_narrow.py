"""Narrow attention computes what the wide one does with the missing dimensions zeroed, and comes back from disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CheckpointError, TargetError
from trimtab.models import ledger_of
from trimtab.models.narrow import check_narrows, narrow_linears
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.weights import Rtn

from .compressing import logits
from .narrowing import narrow_model

ROTARY = ("llama", "mistral", "qwen2")


def wide(family: str) -> PreTrainedModel:
    return random_model(family, hidden_size=128)


@pytest.mark.parametrize("family", ROTARY)
def test_missing_pairs_and_values_are_zeroed_ones_at_every_position(family: str, tokens: Tensor) -> None:
    model = wide(family)
    twin = narrow_model(model, pairs=9, value_dim=13)
    expected = logits(twin, tokens)
    assert torch.allclose(logits(model, tokens), expected, atol=1e-4)
    assert not torch.allclose(expected, logits(wide(family), tokens), atol=1e-1)
    view = ModelView.of(model).blocks[0].attention
    assert (view.head_dim, view.value_dim, view.rotary_dim) == (18, 13, 18)


def test_normalised_heads_can_lose_values(tokens: Tensor) -> None:
    model = wide("qwen3")
    twin = narrow_model(model, pairs=None, value_dim=5)
    assert torch.allclose(logits(model, tokens), logits(twin, tokens), atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_cached_decoding_is_the_whole_forward(family: str, tokens: Tensor) -> None:
    model = wide(family)
    narrow_model(model, pairs=9, value_dim=14, step=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        stepped = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]
    assert torch.allclose(torch.cat(stepped, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_narrow_models_come_back(family: str, tokens: Tensor, tmp_path: Path) -> None:
    model = wide(family)
    narrow_model(model, pairs=9, value_dim=14, step=2)
    tt.save(model, tmp_path / "out")
    expected = logits(model, tokens)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), expected)
    base = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["layers"] == {}
    assert described["narrow"]["model.layers.1.self_attn.k_proj"]["shape"] == [2 * 14, 128]


def test_narrow_layers_can_be_compressed_and_come_back(tokens: Tensor, tmp_path: Path) -> None:
    model = wide("qwen2")
    narrow_model(model, pairs=9, value_dim=14, step=2)
    tt.compress(model, Rtn(bits=4, group_size=-1), progress=False)
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(model, tokens))


def test_copies_compute_the_same_and_attentions_can_be_asked_for(tokens: Tensor) -> None:
    model = wide("llama")
    narrow_model(model, pairs=9, value_dim=14)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    assert len(weights) == 2
    assert torch.allclose(weights[0].sum(-1), torch.ones(()), atol=1e-5)


def test_the_ledger_counts_what_is_left() -> None:
    model, original = wide("llama"), ledger_of(wide("llama"))
    narrow_model(model, pairs=8, value_dim=12)
    ledger = ledger_of(model)
    assert ledger.kv_bytes_per_token == 2 * 2 * (16 + 12) * 4  # blocks, heads, dimensions, float32
    lost = 128 * ((4 + 2) * 16 + (4 + 2) * 20)
    assert original.macs_per_token - ledger.macs_per_token == 2 * lost
    assert original.bytes_at_rest - ledger.bytes_at_rest == 2 * (lost * 4 - 2 * 8 * 8)  # less the pairs that it stores


def test_a_whole_model_is_not_narrow() -> None:
    for family in ("llama", "gpt2", "opt", "phi3", "gpt_neox", "gemma3"):
        assert narrow_linears(random_model(family)) == {}


def test_caches_that_cannot_hold_what_is_left_say_so(tokens: Tensor) -> None:
    unequal, moved = wide("llama"), wide("llama")
    narrow_model(unequal, pairs=8, value_dim=12)
    with pytest.raises(TargetError, match="keys of 16 and values of 12 dimensions"):
        tt.cache.Exact().new(unequal)
    narrow_model(moved, pairs=8, value_dim=16)
    with pytest.raises(TargetError, match="rotary pairs of its own"):
        tt.cache.Streaming().new(moved)
    with torch.no_grad():
        cached = moved(tokens, past_key_values=tt.cache.Exact().new(moved)).logits
    assert torch.allclose(cached, logits(moved, tokens), atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox"])
def test_attention_that_cannot_be_narrow_is_refused(family: str) -> None:
    model = random_model(family)
    with pytest.raises(TargetError, match="cannot be made narrower"):
        check_narrows(model, ModelView.of(model).blocks[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda narrow: narrow.__setitem__("model.layers.9.mlp.up_proj", {"shape": [3, 4], "bias": False}),
        lambda narrow: narrow["model.layers.0.self_attn.q_proj"].pop("bias"),
        lambda narrow: narrow["model.layers.0.self_attn.q_proj"].__setitem__("shape", [0, 128]),
        lambda narrow: narrow["model.layers.0.self_attn.q_proj"].__setitem__("shape", "wide"),
    ],
)
def test_damaged_descriptions_are_named(damage: object, tmp_path: Path) -> None:
    model = wide("llama")
    narrow_model(model, pairs=8, value_dim=12)
    tt.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    damage(config["quantization_config"]["narrow"])  # type: ignore[operator]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="narrow layer 'model.layers"):
        tt.load(tmp_path / "out")


def test_other_formats_refuse_what_they_cannot_say(tmp_path: Path) -> None:
    model = wide("llama")
    narrow_model(model, pairs=8, value_dim=12)
    with pytest.raises(TargetError, match="narrower than the configuration"):
        tt.export(model, tmp_path / "out.gguf", format="gguf", tokenizer="none")
