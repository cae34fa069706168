"""GGUF files through an independent reader: names, order of rows, metadata, tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import trimtab as tt
from trimtab.core.errors import ConfigError, MissingExtra, TargetError
from trimtab.models.exports import export
from trimtab.models.exports.gguf import Gguf
from trimtab.models.exports.gguf_model import ARCHITECTURES, row_order
from trimtab.models.exports.gguf_tokenizer import vocabulary_of
from trimtab.models.random import random_model

from .making import compressed, grids, llama, with_low_rank
from .readers import TYPE_OF, gguf_weight, read_gguf

NONE = {"tokenizer": "none"}
OURS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.1.attn_norm": "model.layers.1.input_layernorm",
    "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
    "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
    "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
    "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj",
    "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
    "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
}


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    dense = dict(model.state_dict())
    return dense | {f"{name}.weight": layer.dequantize() for name, layer in compressed(model).items()}


def test_the_file_holds_the_model(tmp_path: Path) -> None:
    model = grids(llama(), bits=4, group_size=32)
    done = export(model, tmp_path / "m.gguf", format="gguf", **NONE)
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    assert done.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert {entry["stored_as"] for entry in done.layers} == {"q4_0"}
    assert {entry["relative_error"] for entry in done.layers} == {0.0}
    assert len(tensors) == 2 * 9 + 3
    weights = weights_of(model)
    for theirs, ours in OURS.items():
        kind, shape, data = tensors[f"{theirs}.weight"]
        assert np.array_equal(gguf_weight(kind, shape, data), weights[f"{ours}.weight"].double().numpy())
        assert kind == (2 if ours.endswith("proj") else 0)
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 131,
        "tokenizer.ggml.model": "none",
    }
    assert {key: metadata[key] for key in expected} == expected


@pytest.mark.parametrize("fmt", [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": -1}])
def test_llama_rows_of_queries_and_keys_are_interleaved(fmt: dict[str, Any], tmp_path: Path) -> None:
    """As `W.reshape(heads, 2, d / 2, in).swapaxes(1, 2)`, biases included; Qwen's stay."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    for family, own in (("llama", {"attention_bias": True}), ("qwen2", {})):
        model = grids(random_model(family, **sizes, **own), **fmt)
        export(model, tmp_path / family, format="gguf", **NONE)
        _, tensors = read_gguf(tmp_path / family)
        weights = weights_of(model)
        for theirs, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
            for leaf in ("weight", "bias"):
                value = weights[f"model.layers.0.self_attn.{ours}.{leaf}"].double().numpy()
                if family == "llama":
                    value = value.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(value.shape)
                assert np.array_equal(gguf_weight(*tensors[f"blk.0.{theirs}.{leaf}"]), value)


@given(heads=st.integers(1, 3), half=st.integers(1, 4), seed=st.integers(0, 99))
def test_rows_are_ordered_for_rotation_of_neighbours(heads: int, half: int, seed: int) -> None:
    """Rotating (2 j, 2 j + 1) of what the reordered weights give is rotating (j, j + half) and reordering."""
    rows = heads * 2 * half
    config = LlamaConfig(hidden_size=rows, num_attention_heads=heads, num_key_value_heads=heads, head_dim=2 * half)
    order = row_order("model.layers.0.self_attn.q_proj.weight", ARCHITECTURES["llama"], config)
    assert order is not None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 5, generator=generator)
    angle = torch.rand(half, generator=generator)
    x = torch.randn(5, generator=generator)
    first, second = (weight @ x).view(heads, 2, half).unbind(1)
    rotated = torch.stack([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    even, odd = (weight[order] @ x).view(heads, half, 2).unbind(-1)
    found = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1)
    torch.testing.assert_close(found, rotated)


@pytest.mark.parametrize("dense", ["f16", "bf16", "f32"])
def test_types_of_dense_tensors(dense: str, tmp_path: Path) -> None:
    model = grids(llama(dtype=torch.bfloat16), bits=4, group_size=32)
    export(model, tmp_path / "m.gguf", format="gguf", dense=dense, **NONE)
    export(model, tmp_path / "own.gguf", format="gguf", **NONE)
    _, tensors = read_gguf(tmp_path / "m.gguf")
    kind, shape, data = tensors["token_embd.weight"]
    assert kind == {"f32": 0, "f16": 1, "bf16": 30}[dense]
    expected = model.model.embed_tokens.weight.detach().to(
        getattr(torch, {"f16": "float16", "f32": "float32"}.get(dense, "bfloat16"))
    )
    assert np.array_equal(gguf_weight(kind, shape, data), expected.double().numpy())
    assert tensors["output_norm.weight"][0] == 0
    assert read_gguf(tmp_path / "own.gguf")[1]["output.weight"][0] == 30


@pytest.mark.parametrize("type", ["q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q6_k", "q8_0", "f16", "bf16", "f32"])
def test_projections_report_their_error(type: str, tmp_path: Path) -> None:
    model = grids(llama(hidden_size=256, num_hidden_layers=1), bits=4, symmetric=False, group_size=16)
    done = export(model, tmp_path / "m.gguf", format="gguf", type=type, fallback="q8_0", **NONE)
    _, tensors = read_gguf(tmp_path / "m.gguf")
    for entry in done.layers:
        weight = compressed(model)[entry["layer"]].dequantize(torch.float64).numpy()
        if "proj" in entry["layer"] and entry["layer"].split(".")[-1][0] in "qk":
            continue  # their rows lie in another order
        theirs = next(t for t, ours in OURS.items() if ours.replace(".1.", ".0.") == entry["layer"])
        kind, shape, data = tensors[f"{theirs.replace('blk.1', 'blk.0')}.weight"]
        found = gguf_weight(kind, shape, data)
        error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
        assert entry["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-7)
        wanted = "q8_0" if type in ("q2_k", "q3_k", "q4_k", "q6_k") and shape[1] % 256 else type
        assert entry["stored_as"] == wanted
        assert kind == TYPE_OF.get(wanted, {"f16": 1, "bf16": 30, "f32": 0}.get(wanted))
        assert 0 <= error < 0.4
        assert (error == 0) == (type == "f32")


def test_other_parts_are_projected_when_a_type_is_asked_for(tmp_path: Path) -> None:
    model = with_low_rank(llama())
    with pytest.raises(TargetError, match=r"gguf cannot hold layer 'model.layers.0.self_attn.q_proj': part 1 of kind "
                                          r"'low_rank'.*type=q8_0.*Formats that can hold it: peft"):  # fmt: skip
        export(model, tmp_path / "m.gguf", format="gguf", **NONE)
    done = export(model, tmp_path / "m.gguf", format="gguf", type="q8_0", **NONE)
    _, tensors = read_gguf(tmp_path / "m.gguf")
    found = gguf_weight(*tensors["blk.1.ffn_up.weight"])
    expected = compressed(model)["model.layers.1.mlp.up_proj"].dequantize().numpy()
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.008
    assert max(entry["relative_error"] for entry in done.layers) < 0.008


def test_blocks_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = grids(llama(), bits=4, group_size=32)
    with pytest.raises(TargetError, match=r"blocks of q4_k have 256 inputs.* 64 .*fallback=q8_0"):
        export(model, tmp_path / "m.gguf", format="gguf", type="q4_k", **NONE)
    narrow = grids(random_model("llama"), bits=4, group_size=16)
    with pytest.raises(TargetError, match=r"no block type holds.*groups of 16"):
        export(narrow, tmp_path / "m.gguf", format="gguf", **NONE)
    with pytest.raises(TargetError, match=r"q8_0 have 32 inputs.* 48 .*fallback=f16"):
        export(narrow, tmp_path / "m.gguf", format="gguf", type="q8_0", **NONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "options", "names"),
    [
        ("gemma2", {}, "not 'gemma2'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "'linear'"),
        ("llama", {"hidden_act": "gelu"}, "not 'gelu'"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise(
    family: str, options: dict[str, Any], names: str, tmp_path: Path
) -> None:
    model = grids(random_model(family, hidden_size=64, intermediate_size=128, **options), bits=4, group_size=32)
    with pytest.raises(TargetError, match=names):
        export(model, tmp_path / "m.gguf", format="gguf", **NONE)
    assert not list(tmp_path.iterdir())


def test_scaled_rotary_embedding_of_llama_3(tmp_path: Path) -> None:
    """Divisors of frequencies: 1 for the fast ones, the factor for the slow ones."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = grids(llama(rope_parameters=rope), bits=4, group_size=32)
    export(model, tmp_path / "m.gguf", format="gguf", **NONE)
    kind, shape, data = read_gguf(tmp_path / "m.gguf")[1]["rope_freqs.weight"]
    factors = gguf_weight(kind, shape, data)
    assert (kind, shape) == (0, (16,))
    np.testing.assert_allclose(factors[[0, 15]], [1.0, 8.0], rtol=1e-5)
    assert (np.diff(factors) >= -1e-5).all()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trimtab\[gguf\]'"):
        export(grids(llama(), bits=4, group_size=32), tmp_path / "m.gguf", format="gguf", **NONE)
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_the_reference_model(tmp_path: Path) -> None:
    model = grids(tt.load("ref-mini"), bits=4, group_size=32)
    export(model, tmp_path / "m.gguf", format="gguf")
    metadata, _ = read_gguf(tmp_path / "m.gguf")
    tokenizer = model.trimtab.tokenizer
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "starcoder"
    assert metadata["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.merges"][0] == "Ġ t"
    assert [metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("padding", "bos", "eos")] == [0, 1, 2]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template


def bpe(pre_tokenizer: Any, **model: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[], **model))
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)  # type: ignore[no-untyped-call]


def test_splitters_are_recognised_or_refused() -> None:
    from tokenizers import Regex
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    assert vocabulary_of(bpe(plain), 256).splitter == "gpt-2"
    found = vocabulary_of(bpe(qwen), 260)
    assert found.splitter == "qwen2"
    assert found.tokens[256:] == ["[PAD256]", "[PAD257]", "[PAD258]", "[PAD259]"]
    assert found.types == [1] * 256 + [5] * 4
    assert (found.special, found.adds_bos, found.adds_eos) == ({}, False, False)
    for refused, reason in (
        (bpe(pre_tokenizers.Whitespace()), "splits text by"),
        (bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "other settings"),
        (bpe(None), "does not split"),
        (bpe(plain, byte_fallback=True), "no byte-level BPE"),
    ):
        with pytest.raises(ConfigError, match=rf"{reason}.*tokenizer=none"):
            vocabulary_of(refused, 256)
    with pytest.raises(ConfigError, match="token 255, and the model has 200"):
        vocabulary_of(bpe(plain), 200)


def test_a_model_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer.*tokenizer=none"):
        export(grids(llama(), bits=4, group_size=32), tmp_path / "m.gguf", format="gguf")


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="type"):
        Gguf.from_options({"type": "q5_0"})
    with pytest.raises(ConfigError, match="no option 'kind'"):
        Gguf.from_options({"kind": "q4_0"})
