"""PEFT adapters: base + scaling * B A is the layer, for any alpha, without PEFT's help."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError, TargetError
from trimtab.models import ModelView, random_model
from trimtab.models.exports import export
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.rotation import Rotation

from ..compressing import logits
from .making import compressed, grids, llama, replace, with_low_rank
from .readers import packed_layers


def adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Layer -> what PEFT adds to its weight, with its rules for ranks and scaling."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for name in config["target_modules"]:
        key = name.replace(".", r"\.")
        rank = config["rank_pattern"].get(key, config["r"])
        alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
        b, a = (tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "BA")
        assert b.shape[1] == a.shape[0] == rank
        found[name] = (alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank) * (b @ a)
    assert not tensors
    return found


def dense_weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    module = model.get_submodule(name)
    weight = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 16}, {"alpha": 1.0}, {"alpha": 5, "use_rslora": True}, {"use_rslora": True}]
)
def test_base_and_adapter_are_the_layer(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = with_low_rank(random_model(family))
    done = export(model, tmp_path / "out", format="peft", **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    added = adapter_weights(tmp_path / "out" / "adapter")
    layers = compressed(model)
    assert set(added) == {name for name, layer in layers.items() if len(layer.tensor.parts) > 1}
    for name, layer in layers.items():
        quantized = layer.tensor.parts[0].dequantize()
        assert torch.equal(dense_weight(base, name), quantized)
        total = quantized + added.get(name, 0.0)
        torch.testing.assert_close(total, layer.dequantize(), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert {entry["stored_as"] for entry in done.layers} == {"float32 + adapter", "float32"}


def test_without_alpha_the_factors_stay_as_they_are(tmp_path: Path) -> None:
    model = with_low_rank(llama())
    export(model, tmp_path / "out", format="peft", base="none")
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name, layer in compressed(model).items():
        for part in layer.tensor.parts[1:]:
            assert isinstance(part, LowRank)
            assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], part.left)
            assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], part.right)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


def test_both_factors_share_the_scaling_alike(tmp_path: Path) -> None:
    """Each divided by sqrt(alpha / r): 16 / 4 = 4, so by 2."""
    model = llama()
    linear = ModelView.of(model).linears[0]
    part = svd(linear.weight, 4)
    replace(linear, CompressedTensor((part,)))
    export(model, tmp_path / "out", format="peft", alpha=16)
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"], part.left / 2)
    assert torch.equal(tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], part.right / 2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert not base.model.layers[0].self_attn.q_proj.weight.any()  # nothing but low rank


def test_several_parts_and_a_rotation(tmp_path: Path) -> None:
    """Two low-rank parts become one; the rotation of the input is folded into base and adapter."""
    model = with_low_rank(llama())
    linear = ModelView.of(model).linears[0]
    weight = linear.compressed.tensor.dequantize()
    rotation = Rotation(size=64, seed=3)
    parts = (linear.compressed.tensor.parts[0], svd(weight, 2), svd(weight * 0.1, 3))
    replace(linear, CompressedTensor(parts, rotation))
    export(model, tmp_path / "out", format="peft", alpha=8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    added = adapter_weights(tmp_path / "out" / "adapter")
    total = dense_weight(base, linear.name) + added[linear.name]
    expected = compressed(model)[linear.name].dequantize()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_base(tmp_path: Path) -> None:
    model = with_low_rank(llama(), group_size=32)
    export(model, tmp_path / "out", format="peft", base="compressed-tensors", alpha=2)
    found = packed_layers(tmp_path / "out" / "base")
    for name, layer in compressed(model).items():
        assert torch.equal(torch.from_numpy(found[name]), layer.tensor.parts[0].dequantize(torch.float64))
    base = tt.load(tmp_path / "out" / "base")
    tokens = torch.arange(3, 40)[None]
    added = adapter_weights(tmp_path / "out" / "adapter")
    for linear in ModelView.of(base).linears:
        if linear.name in added:
            weight = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
            weight.weight.data = linear.compressed.dequantize() + added[linear.name]
            linear.replace(weight)
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=1e-3, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no layer has a low-rank part"):
        export(grids(llama(), group_size=32), tmp_path / "out", format="peft")
    with pytest.raises(ConfigError, match="alpha=0"):
        export(with_low_rank(llama()), tmp_path / "out", format="peft", alpha=0)
    with pytest.raises(TargetError, match=r"Conv1D.*base=compressed-tensors"):
        export(with_low_rank(random_model("gpt2")), tmp_path / "out", format="peft", base="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_bfloat16_bases_report_their_rounding(tmp_path: Path) -> None:
    model = with_low_rank(llama(dtype=torch.bfloat16))
    done = export(model, tmp_path / "out", format="peft")
    assert {entry["stored_as"] for entry in done.layers} == {"bfloat16 + adapter", "bfloat16"}
    assert all(1e-4 < entry["relative_error"] < 4e-3 for entry in done.layers)
