"""What every method of the weights room must do, on every line of cases.py."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CompositionError, ConfigError, NumericsError, TargetError
from trimtab.core.recipe import Recipe
from trimtab.core.registry import method_class, methods
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.counting import ledger_of
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView
from trimtab.weights.base import WeightMethod

from .cases import CASES, IDS, LADDERS, SLICES, WITH_FEW_TARGETS, largest_error, least_bits

TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))
case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
FIRST = {name: (name, options) for name, options in reversed(CASES)}
WITH_GROUPS = {n: c for n, c in FIRST.items() if "group_size" in {f.name for f in dataclasses.fields(method_class(n))}}
first_with_groups = pytest.mark.parametrize(("name", "options"), list(WITH_GROUPS.values()), ids=list(WITH_GROUPS))
WITH_BITS = {name: case for name, case in FIRST.items() if name not in LADDERS}
first_with_bits = pytest.mark.parametrize(("name", "options"), list(WITH_BITS.values()), ids=list(WITH_BITS))
first_of_each = pytest.mark.parametrize(("name", "options"), list(FIRST.values()), ids=list(FIRST))


def build(name: str, options: dict[str, Any]) -> WeightMethod:
    method = method_class(name)(**options)
    assert isinstance(method, WeightMethod)
    return method


def possible_bits(name: str) -> tuple[int, ...]:
    return typing.get_args(typing.get_type_hints(method_class(name))["bits"])


def compressed(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet, **settings: Any
) -> PreTrainedModel:
    model = random_model(family)
    return tt.compress(model, build(name, options), calibration=calibration, progress=False, **settings)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_every_method_has_a_case() -> None:
    assert {name for name, _ in (*CASES, *SLICES)} == {
        info.name for info in methods().values() if info.room == "weights"
    }


@first_of_each
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_compresses_saves_and_reloads_every_family(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    """All linears of all blocks replaced; the saved model gives the same logits through plain transformers."""
    model = random_model(family)
    dense = logits(model)
    linears = len(ModelView.of(model).linears)
    tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert sum(isinstance(m, CompressedLinear) for m in model.modules()) == linears
    assert len(model.trimtab.record.changed) == linears
    expected = logits(model)
    assert not torch.equal(expected, dense)
    assert float((expected - dense).norm() / dense.norm()) < 0.7
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)


@case
def test_is_deterministic(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    first, second = (compressed("llama", name, options, calibration).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@case
def test_error_is_small_and_reported(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    dense = random_model("llama")
    weights = {linear.name: linear.weight for linear in ModelView.of(dense).linears}
    model = compressed("llama", name, options, calibration)
    bound = largest_error(options)
    for entry in model.trimtab.record.changed:
        weight = weights[entry["linear"]]
        error = (model.get_submodule(entry["linear"]).dequantize() - weight).square().sum() / weight.square().sum()
        if not model.trimtab.record.changed_dense:  # else the stored weight is that of a rescaled input
            assert entry["relative_weight_error"] == pytest.approx(float(error), rel=1e-4)
        assert 0 < entry.get("relative_error", entry["relative_weight_error"]) < bound


@case
def test_more_bits_mean_less_error(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    errors = []
    for finer in LADDERS.get(name) or [{"bits": bits} for bits in possible_bits(name)]:
        model = compressed("llama", name, {**options, **finer}, calibration)
        errors.append(sum(entry["relative_weight_error"] for entry in model.trimtab.record.changed))
    assert errors == sorted(errors, reverse=True)


@case
def test_ledger_counts_the_buffers(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model = compressed("llama", name, options, calibration)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    held = sum(t.numel() * t.element_size() for m in layers for t in m.stored().values())
    ledger = ledger_of(model)
    assert ledger.compressed_bytes == held == sum(entry["nbytes"] for entry in model.trimtab.record.changed)
    assert model.trimtab.record.ledger == ledger.to_dict()
    assert ledger.baseline_bytes == ledger_of(random_model("llama")).bytes_at_rest
    assert least_bits(options) < ledger.bits_per_weight < least_bits(options) + 3


@case
def test_changes_the_model_in_place(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model = random_model("llama")
    untouched = {key: value.clone() for key, value in model.state_dict().items() if "proj" not in key}
    assert tt.compress(model, build(name, options), calibration=calibration, progress=False) is model
    for key in model.trimtab.record.changed_dense:
        del untouched[key]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in untouched.items())


@case
def test_targets_limit_what_is_changed(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    few = {**options, **WITH_FEW_TARGETS.get(name, {}), "targets": ("q_proj", "*.1.mlp.down_proj")}
    model = compressed("llama", name, few, calibration)
    changed = [entry["linear"] for entry in model.trimtab.record.changed]
    assert sorted(changed) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    reasons = {entry["module"]: entry["reason"] for entry in model.trimtab.record.unchanged}
    assert reasons["model.layers.0.mlp.down_proj"] == "no pattern in `targets` matches it"
    assert {"lm_head", "model.embed_tokens"} <= set(reasons)
    assert len(reasons) == 14 - 3 + 2


@case
def test_all_types_of_weights_and_of_calibration_modes(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = random_model("qwen2", dtype=torch.bfloat16)
    tt.compress(model, build(name, options), calibration=calibration, mode="dense", progress=False)
    assert logits(model).dtype == torch.bfloat16
    assert bool(torch.isfinite(logits(model)).all())


@case
def test_recipe_round_trip(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    method = build(name, options)
    recipe = Recipe.from_dict(Recipe.of(method).to_dict())
    assert recipe.methods() == [method]
    by_method = compressed("llama", name, options, calibration)
    by_recipe = tt.compress(random_model("llama"), recipe, calibration=calibration, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(by_method.state_dict().values(), by_recipe.state_dict().values(), strict=True)
    )
    assert by_method.trimtab.recipe == by_recipe.trimtab.recipe == recipe


@case
def test_a_second_application_is_refused(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    model = compressed("llama", name, options, calibration)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompositionError, match="already compressed"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)
    model.trimtab.recipe = None  # as in a model whose history was lost
    with pytest.raises(CompositionError, match=r"model\.layers\.0\.self_attn\.q_proj is already compressed"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@first_with_bits
def test_unknown_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bits'"):
        method_class(name).from_options({"bit": 4})


@first_with_bits
@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, "four"])
def test_bits_outside_the_range_are_refused(name: str, options: dict[str, Any], bits: object) -> None:
    *most, last = map(str, possible_bits(name))
    with pytest.raises(ConfigError, match=f"bits=.*{', '.join(most)} or {last}"):
        method_class(name).from_options({"bits": bits})


@first_with_groups
@pytest.mark.parametrize("group_size", [0, -2])
def test_group_sizes_that_cannot_be_are_refused(name: str, options: dict[str, Any], group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size} must be positive, or -1"):
        build(name, {**options, "group_size": group_size})


@first_with_groups
def test_a_group_that_does_not_divide_is_refused_before_any_work(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """48 is 3 x 16 but 112 is not a multiple of 48: the first layers would fit, the last would not."""
    model = random_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"down_proj.*group_size=48 does not divide 112.*fit all 14 .*: 8, 16, -1\."):
        tt.compress(model, build(name, {**options, "group_size": 48}), calibration=calibration, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@first_of_each
def test_targets_that_match_nothing_are_refused(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    with pytest.raises(TargetError, match=r"'q_porj'.*Did you mean 'q_proj' \(2 matches\)"):
        compressed("llama", name, {**options, "targets": ("q_porj",)}, calibration)


@first_of_each
def test_the_same_defaults_as_its_siblings(name: str, options: dict[str, Any]) -> None:
    """Comparisons on the same grid are at equal bytes; methods that round inputs too take one group per row."""
    grid = ["bits", "symmetric", "clip", "scale_dtype"]
    if name not in ("qllm", "mergequant"):
        grid.append("group_size")
    defaults = {f.name: f.default for f in dataclasses.fields(method_class(name))}
    rtn = {f.name: f.default for f in dataclasses.fields(method_class("rtn"))}
    assert all(defaults[option] == rtn[option] for option in grid if option in defaults)


@first_of_each
def test_zero_rows_zero_groups_and_dead_channels_stay_finite(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """A row of zeros, a group of zeros, and an input channel that no token ever reaches."""
    model = random_model("llama")
    for linear in ModelView.of(model).linears:
        weight = linear.weight.clone()
        weight[1] = 0
        weight[:, :16] = 0
        linear.set_weight(weight)
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[5] = 0
    tt.compress(model, build(name, options), calibration=calibration, progress=False)
    assert bool(torch.isfinite(logits(model)).all())
    for linear in ModelView.of(model).linears:
        assert linear.compressed is not None
        assert bool(torch.isfinite(linear.compressed.dequantize()).all())


@first_of_each
def test_broken_weights_and_activations_are_named(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.inf
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj .*row 3, column 4"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)
    if not build(name, options).needs:
        return
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[2] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn"):
        tt.compress(model, build(name, options), calibration=calibration, progress=False)


@first_of_each
@pytest.mark.parametrize("mode", ["sequential", "dense"])
def test_a_run_killed_between_blocks_ends_with_the_same_weights(
    mode: str, name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    """What stayed of it, plans and the first block, is taken; the rest, tuning included, is computed anew."""
    settings = {"mode": mode, "state_dir": tmp_path / "state"}
    whole = compressed("llama", name, options, calibration, **settings).state_dict()
    shutil.rmtree(tmp_path / "state" / "block-0001")
    model = compressed("llama", name, options, calibration, **settings)
    assert model.trimtab.record.metrics["resumed_blocks"] == 1
    again = model.state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)
