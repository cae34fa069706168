"""Plans: applying twice is applying once, merging is applying both, and files keep every decision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimtab.core.errors import CheckpointError, CompositionError, TargetError
from trimtab.models.compression import compress
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.weights import Magnitude
from trimtab.weights._pruning.plan import Plan, PlanDifference, PlanEntry
from trimtab.weights._pruning.units import UnitMap, elements, heads, neurons


def maps(view: ModelView) -> list[UnitMap]:
    found: list[UnitMap] = []
    for block in view.blocks:
        found += [neurons(block), heads(block), elements(block.linears[0])]
    return found


def plan(seed: int, view: ModelView, first: int = 0, last: int | None = None) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    chosen = maps(view)[first:last]
    return Plan(tuple(PlanEntry.of(u, torch.rand(u.count, generator=generator) < 0.6) for u in chosen))


def weights_after(*plans: Plan) -> dict[str, torch.Tensor]:
    model = random_model("qwen2")
    view = ModelView.of(model)
    for one in plans:
        one.zero(view.linears, maps(view))
    return model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_applying_twice_is_applying_once_and_merging_is_applying_both() -> None:
    view = ModelView.of(random_model("qwen2"))
    a, b = plan(0, view), plan(1, view, 1, 5)
    assert same(weights_after(a, a), weights_after(a))
    assert same(weights_after(a.merge(b)), weights_after(a, b))
    assert same(weights_after(b.merge(a)), weights_after(a, b))
    assert not same(weights_after(a), weights_after(a, b))
    assert a.merge(a) == a
    assert a.merge(b).diff(b.merge(a)) == ()


def test_removed_entries_are_zero_and_no_other_changes() -> None:
    model, original = random_model("qwen2"), random_model("qwen2")
    view = ModelView.of(model)
    chosen = plan(0, view)
    masks = chosen.masks(maps(view))
    chosen.zero(view.linears, maps(view))
    for linear, before in zip(view.linears, ModelView.of(original).linears, strict=True):
        mask = masks.get(linear.name, torch.tensor(True))
        assert torch.equal(linear.weight, torch.where(mask, before.weight, 0))


def test_a_file_keeps_every_decision(tmp_path: Path) -> None:
    chosen = plan(0, ModelView.of(random_model("llama")))
    written = Plan(chosen.entries, {"sparsity": "2:4", "within": "row"})
    written.save(tmp_path / "plan.safetensors")
    read = Plan.load(tmp_path / "plan.safetensors")
    assert read == written
    assert read.budget == written.budget
    assert read.table() == written.table()
    assert written.diff(read) == ()
    units = sum(entry.units for entry in written.entries)
    assert (tmp_path / "plan.safetensors").stat().st_size < units / 8 + 4000


@pytest.mark.parametrize("amount", [0.4, "2:4"])
def test_the_plan_of_a_pruned_model_prunes_a_fresh_one_alike(amount: float | str) -> None:
    model, fresh = random_model("llama"), random_model("llama")
    compress(model, Magnitude(sparsity=amount), progress=False)
    found = Plan.of_model(model)
    view = ModelView.of(fresh)
    found.zero(view.linears, [elements(x) for x in view.linears])
    for pruned, zeroed in zip(ModelView.of(model).linears, view.linears, strict=True):
        assert pruned.compressed is not None
        assert torch.equal(pruned.compressed.dequantize(), zeroed.weight)
    assert Plan.of_model(random_model("llama")).entries == ()


def test_differences_are_counted() -> None:
    first = Plan((PlanEntry("block.mlp", "neuron", torch.tensor([1, 1, 0, 0]).bool()),))
    second = Plan(
        (
            PlanEntry("block.mlp", "neuron", torch.tensor([1, 0, 1, 0]).bool()),
            PlanEntry("block.attention", "head", torch.tensor([1, 0]).bool()),
        )
    )
    assert first.diff(second) == (
        PlanDifference("block.mlp", "neuron", 1, 1, 1),
        PlanDifference("block.attention", "head", 1, 0, 1),
    )
    assert first.diff(first) == ()
    assert first.table() == [{"name": "block.mlp", "kind": "neuron", "units": 4, "kept": 2, "kept_fraction": 0.5}]


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    view = ModelView.of(model)
    stranger = Plan((PlanEntry("model.layers.9.mlp", "neuron", torch.ones(4, dtype=torch.bool)),))
    with pytest.raises(TargetError, match=r"neuron units of model\.layers\.9\.mlp, which the model does not have"):
        stranger.zero(view.linears, maps(view))
    entry = PlanEntry("b", "head", torch.ones(4, dtype=torch.bool))
    with pytest.raises(CompositionError, match="two entries of head units in b"):
        Plan((entry, entry))
    with pytest.raises(CompositionError, match="4 and 2 head units in b"):
        Plan((entry,)).merge(Plan((PlanEntry("b", "head", torch.ones(2, dtype=torch.bool)),)))
    chosen = plan(0, view)
    compress(model, Magnitude(targets=("*.1.mlp.down_proj",)), progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = ModelView.of(model)
    with pytest.raises(TargetError, match="already compressed"):
        chosen.zero(again.linears, maps(again))
    assert same(model.state_dict(), before)
    for name, content in (("a", {"x": torch.ones(1)}), ("b", None)):
        path = tmp_path / name
        if content is None:
            path.write_bytes(b"no safetensors")
        else:
            save_file(content, path)
        with pytest.raises(CheckpointError):
            Plan.load(path)
    with pytest.raises(CheckpointError):
        Plan.load(tmp_path / "missing")
