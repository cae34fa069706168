"""Checkpoints of other libraries that are damaged, or that say what our grids cannot: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from trimtab.core.errors import CheckpointError
from trimtab.models.exports import export

from ..compressing import logits
from .making import compressed, grids, llama, same_layers
from .readers import gptq_layers, packed_layers

LAYER = "model.layers.1.mlp.gate_proj"
Tensors = dict[str, Tensor]
Config = dict[str, Any]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Export, change tensors or quantization_config in place, give the directory."""

    def edit(format: str, change: Callable[[Tensors, Config], None], **fmt: Any) -> Path:
        out = tmp_path / "out"
        model = grids(llama(), **{"bits": 4, "group_size": 32, **fmt})
        export(model, out, format=format, force=True)
        tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))
        return out

    return edit


def _permuted(t: Tensors, c: Config) -> None:
    c["desc_act"] = True
    t[f"{LAYER}.g_idx"] = t[f"{LAYER}.g_idx"].flip(0)


def _weights(c: Config) -> Config:
    weights: Config = c["config_groups"]["group_0"]["weights"]
    return weights


BROKEN: list[tuple[str, Callable[[Tensors, Config], Any], str]] = [
    ("gptq", _permuted, rf"{LAYER}.*g_idx, desc_act=true"),
    ("gptq", lambda t, c: c.update(bits=5), "5 bits; trimtab's grids"),
    ("gptq", lambda t, c: c.update(bits=2), "'qweight' is torch.int32"),
    ("gptq", lambda t, c: c.update(group_size=40), "group_size 40 does not divide 96"),
    ("gptq", lambda t, c: c.update(group_size=16), r"'qzeros' is torch.int32 \[3, 8\].*\[6, 8\]"),
    ("gptq", lambda t, c: c.update(checkpoint_format="marlin"), "checkpoint_format 'marlin'.*gptq, gptq_v2"),
    ("gptq", lambda t, c: c.update(dynamic={"-:.*": {}}), "'dynamic'"),
    ("gptq", lambda t, c: t.pop(f"{LAYER}.scales"), rf"{LAYER}.*'scales' is missing"),
    ("gptq", lambda t, c: t.update({f"{LAYER}.bias": torch.ones(96)}), "gate_proj.bias' is not zero"),
    ("gptq", lambda t, c: [t.pop(name) for name in list(t) if "q_proj" in name], "the weights lack .*q_proj.weight"),
    ("gptq", lambda t, c: t.update({"score.qweight": torch.zeros(2, 2)}), "'score', which is no linear"),
    ("gptq", lambda t, c: t[f"{LAYER}.scales"].fill_(float("nan")), rf"{LAYER}.*scales are not positive"),
    ("gptq", lambda t, c: [t.pop(name) for name in list(t) if "qweight" in name], "no layer has 'qweight'"),
    ("compressed-tensors", lambda t, c: c.pop("config_groups"), "no 'config_groups'"),
    ("compressed-tensors", lambda t, c: c.update(format="int-quantized"), "format 'int-quantized'"),
    ("compressed-tensors", lambda t, c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
     "quantized activations"),
    ("compressed-tensors", lambda t, c: c["config_groups"]["group_0"].update(targets=["re:.*mlp"]), "no config group"),
    ("compressed-tensors", lambda t, c: c.update(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    ("compressed-tensors", lambda t, c: _weights(c).update(num_bits=6), "6 bits"),
    ("compressed-tensors", lambda t, c: _weights(c).update(num_bits=8), "'weight_packed' is torch.int32"),
    ("compressed-tensors", lambda t, c: _weights(c).update(strategy="block"), "strategy 'block'"),
    ("compressed-tensors", lambda t, c: _weights(c).update(type="float"), "type 'float'"),
    ("compressed-tensors", lambda t, c: _weights(c).update(symmetric=False), "'weight_zero_point' is missing"),
    ("compressed-tensors", lambda t, c: t[f"{LAYER}.weight_shape"].fill_(9), r"not the \[96, 64\]"),
    ("compressed-tensors", lambda t, c: t.update({f"{LAYER}.weight_g_idx": torch.arange(64).flip(0)}), "weight_g_idx"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "change", "names"), BROKEN)
def test_what_cannot_be_read(
    edited: Callable[..., Path], format: str, change: Callable[[Tensors, Config], Any], names: str
) -> None:
    directory = edited(format, change)
    with pytest.raises(CheckpointError, match=names) as refusal:
        tt.load(directory)
    assert str(directory) in str(refusal.value)


def test_what_other_writers_do(edited: Callable[..., Path]) -> None:
    """Zero biases where the model has none, no g_idx, no version: still the same layers."""
    wanted = grids(llama(), bits=4, group_size=32)

    def as_others(t: Tensors, c: Config) -> None:
        for name in [name for name in t if name.endswith("g_idx")]:
            del t[name]
        t[f"{LAYER}.bias"] = torch.zeros(96)
        del c["checkpoint_format"], c["sym"], c["lm_head"]

    assert same_layers(tt.load(edited("gptq", as_others)), wanted)

    def sorted_groups(t: Tensors, c: Config) -> None:
        t[f"{LAYER}.weight_g_idx"] = torch.arange(64) // 32
        c["config_groups"]["group_0"]["format"] = "pack-quantized"
        c["config_groups"]["group_0"]["weights"]["scale_dtype"] = None
        c["format"] = "mixed-precision"

    assert same_layers(tt.load(edited("compressed-tensors", sorted_groups)), wanted)


@pytest.mark.parametrize(
    ("format", "scales", "symmetric"),
    [("gptq", "scales", True), ("compressed-tensors", "weight_scale", True), ("compressed-tensors", "_scale", False)],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_negative_and_zero_scales(
    edited: Callable[..., Path], format: str, scales: str, symmetric: bool, bits: int
) -> None:
    """The weights are what the tensors say, though our scales are positive."""

    def turn(t: Tensors, c: Config) -> None:
        for name in [name for name in t if name.endswith(scales)]:
            t[name].view(-1)[::3] *= -1
            t[name].view(-1)[1] = 0

    directory = edited(format, turn, bits=bits, symmetric=symmetric)
    found = gptq_layers(directory) if format == "gptq" else packed_layers(directory)
    for name, layer in compressed(tt.load(directory)).items():
        assert torch.equal(layer.dequantize(torch.float64), torch.from_numpy(found[name]) + 0.0), name
        layer.tensor.check()


def test_zero_points_tell_more_than_sym(edited: Callable[..., Path]) -> None:
    """A configuration that says sym=true beside other zero points does not change the weights."""
    directory = edited("compressed-tensors", lambda t, c: None, symmetric=False)
    model = tt.load(directory)
    export(model, directory, format="gptq", checkpoint_format="gptq_v2", force=True)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (directory / "config.json").write_text(json.dumps(config))
    assert same_layers(tt.load(directory), model)


def test_the_closest_target_decides(edited: Callable[..., Path]) -> None:
    """A name before a pattern before a class, in whatever order the groups come."""
    wrong = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}

    def with_others(t: Tensors, c: Config) -> None:
        own = c["config_groups"]["group_0"]
        others = {**own, "targets": ["re:.*(mlp|attn)"]}
        named = {**wrong, "targets": ["re:.*gate_proj"]}
        c["config_groups"] = {"a": wrong, "b": named, "c": others, "d": {**own, "targets": gates}}

    gates = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    assert same_layers(tt.load(edited("compressed-tensors", with_others)), grids(llama(), bits=4, group_size=32))


def test_pickled_weights_are_not_read(edited: Callable[..., Path]) -> None:
    directory = edited("gptq", lambda t, c: None)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        tt.load(directory)


def test_dtype_and_report(edited: Callable[..., Path]) -> None:
    directory = edited("gptq", lambda t, c: None)
    model = tt.load(directory, dtype="float16", device="cpu")
    assert model.dtype == torch.float16
    assert model.trimtab.source == str(directory)
    assert model.trimtab.recipe is None
    tokens = torch.arange(3, 30)[None]
    assert torch.isfinite(logits(model, tokens)).all()
    assert "g_idx" not in " ".join(model.state_dict())
