"""What every method of the layers room must do, on every line of cases.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CompositionError, ConfigError, DataError, NumericsError, TargetError
from trimtab.core.recipe import Recipe
from trimtab.core.registry import method_class, methods
from trimtab.layers.base import LayerMethod
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.counting import ledger_of
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView

from .cases import BAD, CASES, IDS

TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))
case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
FIRST = {name: (name, options) for name, options in reversed(CASES)}
first_of_each = pytest.mark.parametrize(("name", "options"), list(FIRST.values()), ids=list(FIRST))


def build(name: str, options: dict[str, Any]) -> LayerMethod:
    method = method_class(name)(**options)
    assert isinstance(method, LayerMethod)
    return method


def converted(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet, **settings: Any
) -> PreTrainedModel:
    model = random_model(family)
    return tt.compress(model, build(name, options), calibration=calibration, progress=False, **settings)


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert isinstance(found, Tensor)
    return found


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_every_method_has_a_case() -> None:
    assert {name for name, _ in CASES} == {info.name for info in methods().values() if info.room == "layers"}


@first_of_each
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_converts_saves_and_reloads_every_family(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    """The saved model gives the same logits through plain transformers, and through trimtab with its history."""
    model = random_model(family)
    dense = logits(model)
    method = build(name, options)
    assert tt.compress(model, method, calibration=calibration, progress=False) is model
    expected = logits(model)
    assert not torch.equal(expected, dense)
    assert float((expected - dense).norm() / dense.norm()) < 1
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)
    again = tt.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert again.trimtab.recipe == Recipe.of(method)
    assert again.trimtab.record.ledger == ledger_of(again).to_dict() == ledger_of(model).to_dict()


@case
@pytest.mark.parametrize("mode", ["sequential", "dense"])
def test_is_deterministic_and_follows_its_recipe(
    mode: str, name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    recipe = Recipe.from_dict(Recipe.of(build(name, options)).to_dict())
    by_recipe = tt.compress(random_model("llama"), recipe, calibration=calibration, mode=mode, progress=False)
    assert same(converted("llama", name, options, calibration, mode=mode), by_recipe)
    assert by_recipe.trimtab.recipe == recipe


@case
def test_generates_the_same_with_a_cache_as_without(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """Tokens one by one through the cache, and the whole text at once, are the same function."""
    model = converted("llama", name, options, calibration)
    prompt = TOKENS[:1, :12]
    found = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found.shape == (1, 18)
    with torch.no_grad():
        whole = model(input_ids=found).logits[0, 11:-1]
    assert torch.equal(whole.argmax(dim=-1), found[0, 12:])


@case
def test_ledger_and_record_count_what_is_there(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model, before = converted("llama", name, options, calibration), ledger_of(random_model("llama"))
    ledger = ledger_of(model)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    held = sum(t.numel() * t.element_size() for m in layers for t in m.stored().values())
    record = model.trimtab.record
    assert ledger.compressed_bytes == held == sum(entry["nbytes"] for entry in record.changed)
    assert record.ledger == ledger.to_dict()
    assert ledger.baseline_bytes == before.bytes_at_rest
    assert ledger.bytes_read_per_token < before.bytes_read_per_token
    assert ledger.macs_per_token < before.macs_per_token
    assert ledger.kv_bytes_per_token == before.kv_bytes_per_token
    assert record.metrics["state"] == build(name, options).state
    assert [entry["linear"] for entry in record.changed] == [x.name for x in ModelView.of(model).linears]
    assert all(0 <= entry["relative_error"] < 1 for entry in record.changed)


@case
def test_targets_limit_what_is_changed(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    few = {**options, "targets": ("q_proj", "*.1.mlp.down_proj")}
    model, dense = converted("llama", name, few, calibration), random_model("llama").state_dict()
    changed = {entry["linear"] for entry in model.trimtab.record.changed}
    wanted = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    assert changed == set(wanted)
    state = model.state_dict()
    left = [key for key in dense if key.rpartition(".")[0] not in changed]
    assert all(torch.equal(state[key], dense[key]) for key in left)
    reasons = {entry["module"]: entry["reason"] for entry in model.trimtab.record.unchanged}
    assert reasons["model.layers.0.mlp.down_proj"] == "no pattern in `targets` matches it"
    assert len(reasons) == 14 - 3 + 2


@case
def test_bfloat16_weights(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model = random_model("qwen2", dtype=torch.bfloat16)
    tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert logits(model).dtype == torch.bfloat16
    assert bool(torch.isfinite(logits(model)).all())
    moved = copy.deepcopy(model).to(torch.float32)  # moves no stored number, and takes other inputs
    for place, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            x = torch.randn(12, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
            with torch.no_grad():
                wide = moved.get_submodule(place)(x.float())
                assert float((layer(x).float() - wide).norm() / wide.norm()) < 0.02


@first_of_each
def test_what_is_converted_or_compressed_is_refused(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = converted("llama", name, options, calibration)
    before = copy.deepcopy(model)
    with pytest.raises(CompositionError, match="already converted"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)
    with pytest.raises(CompositionError, match=r"model\.layers\.0\.self_attn\.q_proj is already compressed"):
        tt.compress(model, tt.weights.Rtn(group_size=16), calibration=calibration, progress=False)
    assert same(model, before)
    grids = tt.compress(random_model("llama"), tt.weights.Rtn(group_size=16, targets=("*.1.*",)), progress=False)
    with pytest.raises(CompositionError, match=r"layers\.1\.self_attn\.q_proj is already compressed \(grid\).*targets"):
        tt.compress(grids, build(name, options), calibration=calibration, progress=False)
    rest = build(name, {**options, "targets": ("*.0.*",)})
    tt.compress(grids, rest, calibration=calibration, progress=False)
    assert [step.method for step in grids.trimtab.recipe.steps] == ["rtn", name]


@first_of_each
def test_smaller_dense_linears_are_converted_as_they_are(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """What structured pruning leaves: an MLP of fewer neurons in one block."""
    model = random_model("llama")
    mlp = model.model.layers[1].mlp
    for role in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(mlp, role).weight.data
        weight = weight[:, :70] if role == "down_proj" else weight[:70]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight.clone())
        setattr(mlp, role, linear)
    tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert model.model.layers[1].mlp.down_proj.tensor.shape == (48, 70)
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{n}-{o}" for n, o, _ in BAD])
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_class(name)(**options)


@first_of_each
def test_bad_input_is_refused_before_anything_changes(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = random_model("llama")
    before = copy.deepcopy(model)

    def refused(error: type[Exception], match: str, method: Any = None, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            tt.compress(
                model, method or build(name, options), progress=False, **{"calibration": calibration, **settings}
            )
        assert same(model, before)

    refused(TargetError, r"'q_porj'.*Did you mean 'q_proj' \(2 matches\)", build(name, {"targets": ("q_porj",)}))
    refused(ConfigError, r"of the rooms weights and layers, not 'kivi' \(cache\)", tt.cache.Kivi())
    refused(ConfigError, "Known: dense, sequential", mode="sparse")
    long = CalibrationSet.from_tokens(torch.full((1, 500), 5))
    refused(DataError, "longer than the model's context", calibration=long)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.inf
    before = copy.deepcopy(model)
    refused(NumericsError, r"model\.layers\.1\.mlp\.up_proj .*row 3, column 4")


@first_of_each
def test_broken_activations_are_named(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[2] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)


@first_of_each
def test_dead_channels_and_zero_weights_stay_finite(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = random_model("llama")
    for linear in ModelView.of(model).linears:
        weight = linear.weight.clone()
        weight[1] = 0
        weight[:, :16] = 0
        linear.set_weight(weight)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data.zero_()
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[5] = 0
    tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert bool(torch.isfinite(logits(model)).all())


@case
def test_a_killed_run_ends_with_the_same_model(
    name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converted("llama", name, options, calibration)
    from trimtab.models import compression

    saved = compression.save
    monkeypatch.setattr(compression, "save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    settings = {"calibration": calibration, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        compression.compress_to(random_model("llama"), build(name, options), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "run.json").exists()
    monkeypatch.setattr(compression, "save", saved)
    assert same(
        compression.compress_to(random_model("llama"), build(name, options), tmp_path / "out", **settings), whole
    )
    assert not (tmp_path / "out.partial").exists()
    assert same(tt.load(tmp_path / "out"), whole)
