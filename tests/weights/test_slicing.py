"""What the room does for methods that slice: targets, state, plans, several steps, models that load elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import BudgetError, CompositionError, ConfigError, TargetError
from trimtab.core.recipe import Recipe
from trimtab.models import CompressedLinear, info_of, ledger_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress, compress_to
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView
from trimtab.weights import Gptq, Magnitude, Neurons, Rtn
from trimtab.weights import _loop as loop
from trimtab.weights._pruning.plan import Plan
from trimtab.weights._pruning.units import neurons
from trimtab.weights.base import SlicedBlock

TOKENS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
TEXT = CalibrationSet.from_tokens(torch.randint(3, 131, (8, 32), generator=torch.Generator().manual_seed(0)))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def sliced(family: str = "llama", **options: object) -> PreTrainedModel:
    model = random_model(family)
    return compress(model, Neurons(**options), calibration=TEXT, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sliced_mlps_compute_as_if_the_neurons_were_zero(family: str) -> None:
    model, twin = sliced(family, sparsity=0.3), random_model(family)
    view = ModelView.of(twin)
    maps = [neurons(block) for block in view.blocks]
    Plan.of_model(model).zero(view.linears, maps)
    assert torch.allclose(logits(model), logits(twin), atol=1e-4)
    assert {x.in_features for x in ModelView.of(model).linears if x.role == "down"} == {112 - int(112 * 0.3)}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sliced_models_are_ordinary_smaller_ones(family: str, tmp_path: Path) -> None:
    model = sliced(family, sparsity=0.3)
    tt.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(tt.load(tmp_path / "out")), logits(model))
    ledger = ledger_of(model)
    assert ledger.bytes_at_rest == sum(p.numel() * p.element_size() for p in dict(plain.named_parameters()).values())
    assert ledger.bytes_at_rest < ledger.baseline_bytes == ledger_of(random_model(family)).bytes_at_rest


def test_ref_sliced_to_one_width_loads_in_a_process_without_trimtab(tmp_path: Path) -> None:
    model = tt.load("ref")
    compress(model, Neurons(sparsity=0.3, round_to=8), progress=False)
    tt.save(model, tmp_path / "out")
    ids = torch.arange(40)[None] + 100
    script = (
        "import sys, torch; sys.modules['trimtab'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert not any(name.startswith('trimtab.') for name in sys.modules)\n"
        f"with torch.no_grad(): torch.save(model(torch.arange(40)[None] + 100).logits, {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=200)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(ids).logits)


def test_a_killed_run_continues_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Neurons(sparsity=0.3, score="energy", repair="least_squares")
    expected = compress(random_model("qwen2"), method, calibration=TEXT, progress=False)

    class Killed(Exception):
        pass

    install = loop.BlockLoop._install_sliced

    def once(self: loop.BlockLoop, block: object, done: SlicedBlock, advance: object) -> None:
        if block.index == 1:  # type: ignore[attr-defined]
            raise Killed
        install(self, block, done, advance)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(loop.BlockLoop, "_install_sliced", once)
        with pytest.raises(Killed):
            compress(random_model("qwen2"), method, calibration=TEXT, state_dir=tmp_path / "state", progress=False)
    model = random_model("qwen2")
    compress(model, method, calibration=TEXT, state_dir=tmp_path / "state", progress=False)
    assert info_of(model).record.metrics["resumed_blocks"] == 1  # type: ignore[union-attr]
    assert torch.equal(logits(model), logits(expected))
    assert Plan.of_model(model) == Plan.of_model(expected)


def test_the_plan_of_a_sliced_model_is_saved_with_it(tmp_path: Path) -> None:
    model = sliced(sparsity=0.3)
    tt.save(model, tmp_path / "out")
    found = Plan.of_model(tt.load(tmp_path / "out"))
    assert found == Plan.of_model(model)
    assert [(row["kind"], row["units"], row["kept"]) for row in found.table()] == [("neuron", 112, 79)] * 2


@pytest.mark.parametrize("counted", ["parameters", "macs"])
def test_a_share_of_the_whole_model_is_met(counted: str) -> None:
    before, after = ledger_of(random_model("llama")), ledger_of(sliced(sparsity=0.2, counted=counted))
    if counted == "parameters":
        removed = 1 - after.bytes_at_rest / before.bytes_at_rest
    else:
        removed = 1 - after.macs_per_token / before.macs_per_token
    assert removed == pytest.approx(0.2, abs=0.01)


def test_a_share_that_the_mlps_do_not_have_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"The largest possible is 0\.\d+"):
        sliced(sparsity=0.9, counted="parameters")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sparsity": 0.0}, ConfigError, r"must be in \(0, 1\)"),
        ({"sparsity": 1.0}, ConfigError, r"must be in \(0, 1\)"),
        ({"sparsity": 0.001}, TargetError, "leaves every neuron of 112"),
        ({"sparsity": 0.1, "round_to": 64}, TargetError, "leaves every neuron of 112"),
        ({"sparsity": 0.3, "round_to": 0}, ConfigError, "at least 1"),
        ({"sparsity": 0.3, "targets": ("gate",)}, TargetError, "targets leaves out .*down_proj"),
        ({"sparsity": 0.3, "targets": ("q",)}, TargetError, "names no MLP"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sliced(**options)


def test_one_recipe_slices_then_quantizes(tmp_path: Path) -> None:
    recipe = Recipe.of(Neurons(sparsity=0.3, round_to=16), Gptq(bits=4, group_size=16))
    model = random_model("llama")
    compress_to(model, recipe, tmp_path / "out", calibration=TEXT, progress=False)
    assert {x.in_features for x in ModelView.of(model).linears if x.role == "down"} == {80}
    assert all(isinstance(x.module, CompressedLinear) for x in ModelView.of(model).linears)
    loaded = tt.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    info = info_of(loaded)
    assert info.recipe is not None
    assert [step.method for step in info.recipe.steps] == ["neurons", "gptq"]
    assert info.record is not None
    assert len(info.record.changed) == 14
    assert len(Plan.of_model(loaded).entries) == 2


def test_two_runs_are_one_recipe() -> None:
    recipe = Recipe.of(Neurons(sparsity=0.3, round_to=16), Rtn(bits=4, group_size=16))
    together, apart = random_model("llama"), random_model("llama")
    compress(together, recipe, progress=False)
    for method in recipe.methods():
        compress(apart, method, progress=False)  # type: ignore[arg-type]
    assert torch.equal(logits(together), logits(apart))
    assert info_of(together).recipe == info_of(apart).recipe


def test_cutting_what_is_compressed_is_refused_before_anything_changes() -> None:
    with pytest.raises(CompositionError, match="already compressed by 'rtn'. Cut with 'neurons' first"):
        Recipe.of(Rtn(), Neurons())
    model = compress(random_model("llama"), Magnitude(), progress=False)
    before = logits(model)
    with pytest.raises(CompositionError, match="already compressed by 'magnitude'"):
        compress(model, Neurons(), progress=False)
    assert torch.equal(logits(model), before)


def test_slices_may_follow_one_another() -> None:
    model = random_model("llama")
    for _ in range(2):
        compress(model, Neurons(sparsity=0.5), progress=False)
    assert {x.in_features for x in ModelView.of(model).linears if x.role == "down"} == {28}
    view = ModelView.of(twin := random_model("llama"))
    plan = Plan.of_model(model)
    assert [(entry.units, entry.kept) for entry in plan.entries] == [(112, 28)] * 2
    plan.zero(view.linears, [neurons(block) for block in view.blocks])
    assert torch.allclose(logits(model), logits(twin), atol=1e-4)
