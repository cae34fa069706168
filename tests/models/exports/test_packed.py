"""compressed-tensors and GPTQ directories: an independent reader, the way back, and what their configurations say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from trimtab.models.checkpoint import weight_files
from trimtab.models.exports import export, hf_directory
from trimtab.models.exports.base import Source
from trimtab.models.exports.compressed_tensors import targets

from ..compressing import logits
from .making import compressed, each, grids, llama, same_layers
from .readers import gptq_layers, packed_layers, stream

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("compressed-tensors", {}),
    ("gptq", {"checkpoint_format": "gptq"}),
    ("gptq", {"checkpoint_format": "gptq_v2"}),
]
READERS = {"compressed-tensors": packed_layers, "gptq": gptq_layers}
TOKENS = torch.arange(3, 43)[None]


@pytest.mark.parametrize(("format", "options"), FORMATS, ids=["compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "group_size"), [(True, 32), (False, 32), (True, -1), (False, -1)])
def test_another_reader_finds_our_weights_and_we_find_our_codes(
    format: str, options: dict[str, Any], bits: int, symmetric: bool, group_size: int, tmp_path: Path
) -> None:
    model = grids(llama(num_hidden_layers=1), bits=bits, symmetric=symmetric, group_size=group_size)
    export(model, tmp_path / "out", format=format, **options)
    found = READERS[format](tmp_path / "out")
    layers = compressed(model)
    assert found.keys() == layers.keys()
    for name, weight in found.items():
        assert np.array_equal(weight, layers[name].dequantize(torch.float64).numpy())
    reloaded = tt.load(tmp_path / "out")
    assert same_layers(model, reloaded)
    assert torch.equal(logits(reloaded, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox"])
def test_families_come_back(format: str, family: str, tmp_path: Path) -> None:
    """Biases, fused layers, tied and untied heads; hidden 64 and MLP 128 fill words for all of them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    extra = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    model = grids(tt.models.random_model(family, **sizes, **extra), bits=4, group_size=32)
    tokens = torch.arange(3, 23)[None]
    expected = logits(model, tokens)
    export(model, tmp_path / "out", format=format)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), expected)


def test_imported_models_are_models_like_others(tmp_path: Path) -> None:
    """Saved as a trimtab checkpoint, exported again to the same bytes."""
    model = grids(llama(), bits=3, symmetric=False, group_size=32)
    model.generation_config.max_new_tokens = 7
    export(model, tmp_path / "first", format="gptq", checkpoint_format="gptq_v2")
    imported = tt.load(tmp_path / "first")
    assert imported.generation_config.max_new_tokens == 7
    tt.save(imported, tmp_path / "saved")
    again = tt.load(tmp_path / "saved")
    assert same_layers(model, again)
    export(again, tmp_path / "second", format="gptq", checkpoint_format="gptq_v2")
    names = ["config.json", "model.safetensors", "quantize_config.json"]
    assert [(tmp_path / "first" / n).read_bytes() for n in names] == [
        (tmp_path / "second" / n).read_bytes() for n in names
    ]


def test_published_zero_words(tmp_path: Path) -> None:
    """Version 1 stores the zero point 8 of a symmetric 4-bit grid as 7, version 2 as 8."""
    model = grids(llama(), bits=4, group_size=32)
    for version, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        export(model, tmp_path / version, format="gptq", checkpoint_format=version)
        tensors = load_file(tmp_path / version / "model.safetensors")
        zeros = tensors["model.layers.0.self_attn.q_proj.qzeros"]
        assert {value & 0xFFFFFFFF for value in zeros.flatten().tolist()} == {word}
    assert tensors["model.layers.0.mlp.down_proj.g_idx"].tolist() == [j // 32 for j in range(96)]


def test_version_1_zeros_of_zero_are_refused_written_and_read_as_zero(tmp_path: Path) -> None:
    """A zero point of 0 cannot be stored less one; where another writer did, in b bits, it is read as 0."""
    model = each(llama(), lambda linear: {"bits": 4, "symmetric": False, "group_size": 32})
    layer = compressed(model)["model.layers.0.mlp.up_proj"]
    layer.stored()["part0_zeros"][3, 1] = 0
    with pytest.raises(tt.core.errors.TargetError, match=r"up_proj.*zero points of 0.*gptq_v2"):
        export(model, tmp_path / "out", format="gptq")
    export(model, tmp_path / "out", format="gptq", checkpoint_format="gptq_v2")
    assert same_layers(tt.load(tmp_path / "out"), model)
    _rewrite(tmp_path / "out", lambda zeros: _minus_one(zeros, 4))
    assert same_layers(tt.load(tmp_path / "out"), model)


def _minus_one(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Every zero point less one, within its own bits."""
    rows = [[(code - 1) % (1 << bits) for code in stream(row, bits, len(row) * 8)] for row in zeros.numpy()]
    packed = [
        [sum(code << 4 * i for i, code in enumerate(row[k : k + 8])) for k in range(0, len(row), 8)] for row in rows
    ]
    return torch.from_numpy(np.array(packed, dtype=np.uint32).view(np.int32))


def _rewrite(directory: Path, change: Any) -> None:
    """Make a version 2 checkpoint one of version 1."""
    from safetensors.torch import save_file

    tensors = load_file(directory / "model.safetensors")
    changed = {name: change(t) if name.endswith("qzeros") else t for name, t in tensors.items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (directory / "config.json").write_text(json.dumps(config))


def test_configuration_of_compressed_tensors(tmp_path: Path) -> None:
    """Only keys that old readers accept, and every dense linear under `ignore`."""
    model = each(llama(), lambda linear: None if linear.role == "o" else {"bits": 4, "group_size": 32})
    export(model, tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": config["version"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "actorder": None,
                    "block_structure": None,
                    "observer": "minmax",
                    "observer_kwargs": {},
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    assert not any(name.endswith("proj.weight") and "o_proj" not in name for name in
                   load_file(tmp_path / "out" / "model.safetensors"))  # fmt: skip


def test_layers_that_differ_are_groups_of_their_own(tmp_path: Path) -> None:
    kinds = [
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 16, "symmetric": False},
        {"bits": 8, "group_size": -1, "scale_dtype": "bfloat16"},
        None,
    ]
    names: dict[str, dict[str, Any] | None] = {}

    def choose(linear: Any) -> dict[str, Any] | None:
        return names.setdefault(linear.name, kinds[len(names) % 4])

    model = each(llama(num_hidden_layers=12), choose)
    export(model, tmp_path / "out", format="compressed-tensors")
    found = packed_layers(tmp_path / "out")
    assert len(found) == 63
    for name, layer in compressed(model).items():
        assert np.array_equal(found[name], layer.dequantize(torch.float64).numpy())
    reloaded = tt.load(tmp_path / "out")
    assert same_layers(model, reloaded)
    assert torch.equal(logits(reloaded, TOKENS), logits(model, TOKENS))


def test_targets_name_exactly_their_layers() -> None:
    import re

    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(25) for p in "qkvo"] + ["score", "head.out"]
    names += ["model.layers.1.self_attn.q_proj2", "model.layers.1.self_attn.q_pro", "xmodel.layers.1.self_attn.q_proj"]
    chosen = ["model.layers.1.self_attn.q_proj", "model.layers.12.self_attn.q_proj", "score"]
    patterns = [target.removeprefix("re:") for target in targets(chosen)]
    assert len(patterns) == 2
    assert [name for name in names if any(re.match(pattern, name) for pattern in patterns)] == chosen


@pytest.mark.parametrize(("scale_dtype", "dtype"), [("float16", torch.bfloat16), ("bfloat16", torch.float16)])
def test_scales_keep_their_dtype(scale_dtype: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = grids(llama(dtype=dtype), bits=4, group_size=32, scale_dtype=scale_dtype)
    export(model, tmp_path / "out", format="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert str(tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype) == f"torch.{scale_dtype}"
    reloaded = tt.load(tmp_path / "out")
    assert reloaded.dtype == dtype
    assert same_layers(model, reloaded)


def test_bfloat16_scales_that_float16_holds_go_to_gptq(tmp_path: Path) -> None:
    model = grids(llama(), bits=4, group_size=32, scale_dtype="bfloat16")
    export(model, tmp_path / "out", format="gptq")
    found = gptq_layers(tmp_path / "out")
    for name, layer in compressed(model).items():
        assert np.array_equal(found[name], layer.dequantize(torch.float64).numpy())


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models go into several files with an index, which hold every tensor once."""
    model = grids(llama(), bits=4, group_size=32)
    export(model, tmp_path / "one", format="compressed-tensors")
    monkeypatch.setattr(hf_directory, "SHARD_BYTES", 20_000)
    export(model, tmp_path / "many", format="compressed-tensors")
    files = weight_files(tmp_path / "many")
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    held = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in shard.values()) <= 20_000 or len(shard) == 1 for shard in held)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert sorted(name for shard in held for name in shard) == sorted(whole)
    assert same_layers(tt.load(tmp_path / "many"), model)


def test_source_sees_layers_and_dense_linears() -> None:
    model = each(llama(), lambda linear: {"group_size": 32} if linear.role == "up" else None)
    source = Source.of(model)
    assert list(source.layers) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert len(source.dense) == 13  # six linears in each of two blocks, and the head
    gpt2 = grids(tt.models.random_model("gpt2"), group_size=16)
    assert all(layer.transposed for layer in Source.of(gpt2).layers.values())
