"""What every method that cuts neurons out of MLPs must do, on every line of SLICES in cases.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.core.recipe import Recipe
from trimtab.core.registry import method_class
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.counting import ledger_of
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView
from trimtab.weights import PruneNet
from trimtab.weights._pruning.plan import Plan
from trimtab.weights._pruning.units import neurons
from trimtab.weights._slicer import NeuronMethod

from .cases import SLICE_IDS, SLICES
from .test_method_suite import TOKENS, build, compressed, logits

case = pytest.mark.parametrize(("name", "options"), SLICES, ids=SLICE_IDS)
FIRST = {name: (name, options) for name, options in reversed(SLICES)}
first_of_each = pytest.mark.parametrize(("name", "options"), list(FIRST.values()), ids=list(FIRST))
OF_NEURONS = [case for case in FIRST.values() if issubclass(method_class(case[0]), NeuronMethod)]
neuron_method = pytest.mark.parametrize(("name", "options"), OF_NEURONS, ids=[name for name, _ in OF_NEURONS])


def widths(model: PreTrainedModel) -> list[int]:
    return [linear.in_features for linear in ModelView.of(model).linears if linear.role == "down"]


def without_removed(family: str, sliced: PreTrainedModel) -> Tensor:
    """Logits of the whole model with zeros where the plan of the sliced one removed neurons."""
    model = random_model(family)
    view = ModelView.of(model)
    with torch.no_grad():
        Plan.of_model(sliced).zero(view.linears, [neurons(block) for block in view.blocks])
    return logits(model)


@first_of_each
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_smaller_saved_and_loaded_by_transformers(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = compressed(family, name, options, calibration)
    assert len(set(widths(model))) == 1
    assert widths(model)[0] < 112
    expected = logits(model)
    tt.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(tt.load(tmp_path / "out")), expected)


@case
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_it_computes_as_the_model_without_those_neurons(
    family: str, name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """Exactly, without repair; the bias of down stays in either case."""
    model = compressed(family, name, {**options, "repair": "none"}, calibration)
    torch.testing.assert_close(logits(model), without_removed(family, model), rtol=1e-5, atol=1e-5)
    kept = [entry.kept for entry in Plan.of_model(model).entries]
    assert kept == widths(model)


@case
def test_is_deterministic(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    first, second = (compressed("llama", name, options, calibration).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], value) for key, value in second.items())


@case
def test_repair_is_closer_to_the_model(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    """On the text that it was fitted to, what the MLP of the first block adds."""
    exact = random_model("llama")
    calls: list[tuple[Tensor, Tensor]] = []
    mlp = exact.get_submodule("model.layers.0.mlp")
    mlp.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    with torch.no_grad():
        exact(input_ids=calibration.tokens)
    ((inputs, expected),) = calls
    errors = []
    for repair in ("least_squares", "none"):
        model = compressed("llama", name, {**options, "repair": repair}, calibration)
        with torch.no_grad():
            errors.append(float((model.get_submodule("model.layers.0.mlp")(inputs) - expected).norm()))
    assert errors[0] < errors[1]


@case
def test_ledger_and_record_count_what_is_left(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    dense, model = random_model("llama"), compressed("llama", name, options, calibration)
    width = widths(model)[0]
    ledger = ledger_of(model)
    assert ledger.bytes_at_rest == ledger_of(dense).bytes_at_rest - 2 * 3 * 48 * (112 - width) * 4
    assert ledger.macs_per_token == ledger_of(dense).macs_per_token - 2 * 3 * 48 * (112 - width)
    record = model.trimtab.record
    assert record.ledger == ledger.to_dict()
    assert {entry["role"] for entry in record.changed} == {"gate", "up", "down"}
    assert sum(entry["nbytes"] for entry in record.changed) == 2 * 3 * 48 * width * 4
    assert {entry["module"] for entry in record.unchanged} >= {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert model.config.intermediate_size == width


@case
def test_recipe_round_trip(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    method = build(name, options)
    recipe = Recipe.from_dict(Recipe.of(method).to_dict())
    assert recipe.methods() == [method]
    by_recipe = tt.compress(random_model("llama"), recipe, calibration=calibration, progress=False)
    assert torch.equal(logits(by_recipe), logits(compressed("llama", name, options, calibration)))


@first_of_each
def test_all_types_of_weights_and_of_calibration_modes(
    name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    model = random_model("qwen2", dtype=torch.bfloat16)
    tt.compress(model, build(name, options), calibration=calibration, mode="sequential", progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


@case
def test_neurons_that_never_fire_and_singular_grams_stay_finite(name: str, options: dict[str, Any]) -> None:
    """Half of the neurons are dead, and the text has fewer tokens than there are neurons."""
    model = random_model("llama")
    for linear in ModelView.of(model).linears:
        if linear.role in ("gate", "up"):
            weight = linear.weight.clone()
            weight[::2] = 0
            linear.set_weight(weight)
    short = CalibrationSet.from_tokens(TOKENS, source="random tokens")
    tt.compress(model, build(name, options), calibration=short, progress=False)
    assert bool(torch.isfinite(logits(model)).all())


@first_of_each
def test_a_run_killed_between_blocks_ends_with_the_same_weights(
    name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    settings = {"state_dir": tmp_path / "state"}
    whole = compressed("llama", name, options, calibration, **settings)
    shutil.rmtree(tmp_path / "state" / "block-0001")
    model = compressed("llama", name, options, calibration, **settings)
    assert model.trimtab.record.metrics["resumed_blocks"] == 1
    again = model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in whole.state_dict().items())
    assert Plan.of_model(model) == Plan.of_model(whole)


@first_of_each
def test_some_blocks_only_and_never_a_part_of_a_neuron(
    name: str, options: dict[str, Any], calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = compressed("llama", name, {**options, "targets": ("model.layers.1.mlp.*",)}, calibration)
    assert widths(model)[0] == 112 > widths(model)[1]
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(tt.load(tmp_path / "out")), logits(model))
    with pytest.raises(TargetError, match=r"leaves out model\.layers\.0\.mlp\.up_proj"):
        compressed("llama", name, {**options, "targets": ("gate", "down")}, calibration)
    with pytest.raises(TargetError, match="MLP|nothing of parts"):
        compressed("llama", name, {**options, "targets": ("q_proj",)}, calibration)


@first_of_each
def test_what_is_left_can_be_quantized(name: str, options: dict[str, Any], calibration: CalibrationSet) -> None:
    steps = [{"method": name, **options, "round_to": 16}, {"method": "rtn", "bits": 8, "group_size": 16}]
    recipe = Recipe.from_dict({"steps": steps})
    model = tt.compress(random_model("llama"), recipe, calibration=calibration, progress=False)
    assert widths(model)[0] % 16 == 0
    assert all(linear.compressed is not None for linear in ModelView.of(model).linears)
    sliced = compressed("llama", name, {**options, "round_to": 16}, calibration)
    assert float((logits(model) - logits(sliced)).norm() / logits(sliced).norm()) < 0.05


# Counts


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.3, 0.55, 0.9])
def test_counts_are_those_of_the_methods(sparsity: float) -> None:
    """PruneNet keeps int((1 - c) n), without the errors of binary fractions."""
    percent = round(100 * sparsity)
    for width in (7, 100, 112, 704, 11008):
        assert PruneNet(sparsity=sparsity).width(width) == (100 - percent) * width // 100
        assert PruneNet(sparsity=sparsity, round_to=8).width(width) % 8 in (0, width % 8)
        assert PruneNet(sparsity=sparsity, round_to=8).width(width) >= PruneNet(sparsity=sparsity).width(width)


@neuron_method
@pytest.mark.parametrize("counted", ["parameters", "macs"])
def test_shares_of_the_whole_model(
    counted: str, name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    """To within one neuron of each block."""
    dense = ledger_of(random_model("llama"))
    model = compressed("llama", name, {**options, "sparsity": 0.2, "counted": counted}, calibration)
    ledger = ledger_of(model)
    before, after = (x.macs_per_token if counted == "macs" else x.bytes_at_rest // 4 for x in (dense, ledger))
    assert abs((before - after) - 0.2 * before) < 2 * 3 * 48
    with pytest.raises(BudgetError, match="largest possible is"):
        compressed("llama", name, {**options, "sparsity": 0.95, "counted": counted}, calibration)


# Faults


@first_of_each
@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sparsities_that_cannot_be_are_refused(name: str, options: dict[str, Any], sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity="):
        build(name, {**options, "sparsity": sparsity})


@neuron_method
@pytest.mark.parametrize(("sparsity", "round_to"), [(0.999, 1), (0.001, 8)])
def test_nothing_left_and_nothing_removed_are_refused(
    sparsity: float, round_to: int, name: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    tiny = random_model("llama", intermediate_size=16)
    method = build(name, {**options, "sparsity": sparsity, "round_to": round_to})
    assert isinstance(method, NeuronMethod)
    if method.width(16) == 1:  # methods that round towards keeping leave one
        return
    with pytest.raises(TargetError, match=r"down_proj: sparsity=.* leaves (no|every) neuron of 16"):
        tt.compress(tiny, method, calibration=calibration, progress=False)


@neuron_method
def test_without_text_no_tokenizer_is_needed(name: str, options: dict[str, Any]) -> None:
    model = random_model("llama")
    method = build(name, options)
    assert not method.needs_text
    tt.compress(model, method, progress=False)
    assert widths(model)[0] < 112
    with pytest.raises(ConfigError, match="tokenizer"):
        tt.compress(random_model("llama"), build(name, {**options, "repair": "least_squares"}), progress=False)
