"""Budgets: what is counted, what is chosen, what is expected, what is refused; and the rehearsal that measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.counting import ledger_of
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.weights import _mixture
from trimtab.weights._budget import Budget
from trimtab.weights._mixture import CostTable, Matrix
from trimtab.weights._rehearsal import Rehearsal, split
from trimtab.weights.mixed import Mixed

OPTIONS: dict[str, Any] = {"quantizer": "rtn", "group_sizes": (16, -1)}


def compressed(budget: float | str, calibration: CalibrationSet, **options: Any) -> PreTrainedModel:
    method = Mixed(budget=budget, **{**OPTIONS, **options})
    return tt.compress(random_model("llama"), method, calibration=calibration, progress=False)


def plan_of(model: PreTrainedModel) -> dict[str, Any]:
    plan: dict[str, Any] = model.trimtab.record.metrics["plan"]
    return plan


# budgets


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        *((0.2, 200), ("0.2", 200), ("20%", 200), (1.0, 1000), ("400B", 400), ("1.5kB", 1500), ("2KiB", 2048)),
        *(("3MB", 3_000_000), (2e9, 2_000_000_000), ("1.5 GiB", 3 << 29), ("1e6", 1_000_000)),
    ],
)
def test_budgets_are_read(budget: float | str, expected: int) -> None:
    assert Budget.of(budget).resolve(1000) == expected


@pytest.mark.parametrize("budget", [0, -1, "", "much", "5 apples", "20%MB", "120%", float("nan"), float("inf"), "..5"])
def test_what_is_no_budget_is_refused(budget: float | str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Mixed(budget=budget)


def test_a_budget_has_no_default() -> None:
    with pytest.raises(ConfigError, match="Mixed needs the option 'budget'"):
        Mixed.from_options({})
    with pytest.raises(ConfigError, match="no option 'bits'.*Known: budget"):
        Mixed.from_options({"bits": 4})


def test_the_whole_file_is_within_the_budget_and_as_planned(calibration: CalibrationSet) -> None:
    for budget in ("72kB", "80kB", 0.8):
        model = compressed(budget, calibration)
        plan = plan_of(model)
        assert ledger_of(model).bytes_at_rest == plan["planned_bytes"] <= plan["budget_bytes"]
        assert plan["bfloat16_bytes"] == sum(p.numel() * 2 for p in random_model("llama").parameters())
        for entry in model.trimtab.record.changed:
            group = "row" if entry["group_size"] == -1 else str(entry["group_size"])
            assert plan["choices"][entry["linear"]].startswith(f"rtn-{entry['bits']}-{group}")
    assert plan["budget_bytes"] == int(0.8 * plan["bfloat16_bytes"])


def test_more_bytes_are_expected_to_cost_less_and_do(calibration: CalibrationSet) -> None:
    expected, sums, moved = [], [], []
    original = random_model("llama")
    for budget in ("68kB", "72kB", "80kB", "90kB"):
        model = compressed(budget, calibration)
        expected.append(plan_of(model)["expected_kl_nats_per_token"])
        sums.append(plan_of(model)["sum_of_costs"])
        moved.append(divergence(original, model, calibration))
    assert sums == sorted(sums, reverse=True)
    assert expected == sorted(expected, reverse=True)
    assert moved == sorted(moved, reverse=True)
    for said, measured in zip(expected, moved, strict=True):
        assert said == pytest.approx(measured, rel=0.5)  # 2 x 24 tokens of noise, on weights without structure


def divergence(original: PreTrainedModel, model: PreTrainedModel, text: CalibrationSet) -> float:
    with torch.no_grad():
        p, q = (m(input_ids=text.tokens).logits.log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_sparsity_is_chosen_beside_bits(calibration: CalibrationSet, tmp_path: Path) -> None:
    """Six bits per weight, where there are 8 or 4-bit codes of half of the entries."""
    model = random_model("llama", hidden_size=128, intermediate_size=256)
    entries = sum(linear.weight.numel() for linear in ModelView.of(model).linears)
    budget = ledger_of(model).bytes_at_rest - 4 * entries + entries * 3 // 4
    method = Mixed(budget=budget, widths=(8,), group_sizes=(-1,), sparsities=("50%", "2:4"))
    tt.compress(model, method, calibration=calibration, progress=False)
    plan = plan_of(model)
    assert max(ledger_of(model).bytes_at_rest, plan["planned_bytes"]) <= plan["budget_bytes"]
    sparse = [name for name, choice in plan["choices"].items() if choice.startswith("sparsegpt-")]
    assert 0 < len(sparse) < len(plan["choices"])
    for name in plan["choices"]:
        kind = model.get_submodule(name).tensor.parts[0].kind  # type: ignore[union-attr, operator]
        assert (kind in ("sparse_grid", "bitmap")) == (name in sparse)
    tt.save(model, tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(tt.load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_what_cannot_be_is_refused_before_any_work(calibration: CalibrationSet, tmp_path: Path) -> None:
    model = random_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"smallest possible one is 0\.\d{4} \([\d,]+ bytes\)") as refused:
        tt.compress(model, Mixed(budget=0.3, **OPTIONS), calibration=calibration, state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    least = str(refused.value).split("smallest possible one is ")[1].split()[0]
    assert plan_of(compressed(float(least), calibration))["planned_bytes"] > 0  # as it was said
    with pytest.raises(BudgetError):
        compressed(float(least) - 1e-4, calibration)


def test_group_sizes_that_fit_nowhere_are_refused(calibration: CalibrationSet) -> None:
    with pytest.raises(TargetError, match=r"is 48 wide, which none of the group sizes \[64\] divides"):
        compressed(0.9, calibration, group_sizes=(64,))
    mixture = compressed("75kB", calibration, group_sizes=(48, 56, 16))  # 48 and 112 wide: each takes what fits
    sizes = {entry["group_size"] for entry in mixture.trimtab.record.changed if entry["role"] == "down"}
    assert sizes <= {16, 56}


def test_the_plan_is_remembered(calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Mixed(budget="75kB", **OPTIONS)
    first = tt.compress(random_model("llama"), method, calibration=calibration, state_dir=tmp_path, progress=False)
    monkeypatch.setattr(_mixture, "cost_table", lambda *args: pytest.fail("measured again"))
    again = tt.compress(random_model("llama"), method, calibration=calibration, state_dir=tmp_path, progress=False)
    assert plan_of(first) == plan_of(again)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_costs_serve_other_budgets_of_the_same_model_only(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "costs.json"
    first = compressed("75kB", calibration, costs=str(file))
    measure = _mixture.cost_table
    monkeypatch.setattr(_mixture, "cost_table", lambda *args: pytest.fail("measured again"))
    assert plan_of(compressed("75kB", calibration, costs=str(file))) == plan_of(first)
    compressed("85kB", calibration, costs=str(file))
    with pytest.raises(ConfigError, match=r"costs\.json were measured with another candidates"):
        compressed("75kB", calibration, costs=str(file), widths=(2, 4))
    other = CalibrationSet.from_tokens(calibration.tokens[:5])
    with pytest.raises(ConfigError, match="another text"):
        compressed("75kB", other, costs=str(file))
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no table of costs"):
        compressed("75kB", calibration, costs=str(file))
    monkeypatch.setattr(_mixture, "cost_table", measure)
    file.unlink()
    assert plan_of(compressed("75kB", calibration, costs=str(file))) == plan_of(first)


def test_tables_survive_json() -> None:
    table = CostTable((Matrix("a", ("x", "y"), (1, 2), (0.5, 0.25), (3e-3, 1e-3)),), ((1e-3, 1e-3), (3e-3, 2e-3)))
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


# the expectation


def test_the_expectation_follows_the_curve() -> None:
    table = CostTable((Matrix("a", ("x", "y"), (1, 9), (0.5, 0.25), (0.04, 0.01)),), ((0.01, 0.02), (0.04, 0.03)))
    assert table.expected(table.allocate(9)) == pytest.approx(0.02)
    assert table.expected(table.allocate(1)) == pytest.approx(0.03)
    small = CostTable((Matrix("a", ("x",), (1,), (0.1,), (0.001,)),), table.curve)
    assert small.expected(small.allocate(1)) == pytest.approx(0.002)  # below the curve: in proportion
    between = CostTable((Matrix("a", ("x",), (1,), (0.1,), (0.02,)),), table.curve)
    assert between.expected(between.allocate(1)) == pytest.approx((0.02 * 0.03) ** 0.5)


# the rehearsal


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_beginning_at_a_block_gives_what_the_whole_model_gives(family: str, calibration: CalibrationSet) -> None:
    model = random_model(family)
    _, text = split(calibration)
    rehearsal = Rehearsal(model, text)
    linear = ModelView.of(model).blocks[1].linears[-1]
    changed = {linear.name: linear.weight * 1.2}
    expected = rehearsal.divergence(changed)
    assert expected > 0
    rehearsal.go_to(1)
    assert rehearsal.divergence(changed) == pytest.approx(expected, rel=1e-4)
    assert rehearsal.divergence({}) == pytest.approx(0, abs=1e-6)
    rehearsal.go_to(0)
    assert rehearsal.divergence(changed) == pytest.approx(expected, rel=1e-4)


def test_the_rehearsal_measures_the_divergence_and_leaves_the_model_alone(calibration: CalibrationSet) -> None:
    model = random_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rehearsal = Rehearsal(model, calibration)
    linear = ModelView.of(model).linears[3]
    found = rehearsal.divergence({linear.name: linear.weight * 0.5})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        p = model(input_ids=calibration.tokens).logits.log_softmax(-1)
        linear.module.weight.mul_(0.5)
        q = model(input_ids=calibration.tokens).logits.log_softmax(-1)
    assert found == pytest.approx(float(functional.kl_div(q, p, log_target=True, reduction="sum")) / q[..., 0].numel())


def test_padding_is_not_rehearsed(calibration: CalibrationSet) -> None:
    mask = torch.ones_like(calibration.tokens, dtype=torch.bool)
    mask[:, 12:] = False
    padded = CalibrationSet.from_tokens(calibration.tokens.where(mask, torch.tensor(0)), mask)
    short = CalibrationSet.from_tokens(calibration.tokens[:, :12])
    model = random_model("llama")
    linear = ModelView.of(model).linears[5]
    changed = {linear.name: linear.weight * 0.8}
    expected = Rehearsal(model, short).divergence(changed)
    assert Rehearsal(model, padded).divergence(changed) == pytest.approx(expected, rel=1e-3)
    unmasked = CalibrationSet.from_tokens(padded.tokens)  # a broken variant
    assert Rehearsal(model, unmasked).divergence(changed) != pytest.approx(expected, rel=1e-3)


def test_text_for_measuring_is_not_what_statistics_are_gathered_on(calibration: CalibrationSet) -> None:
    statistics, rehearsed = split(calibration)
    assert len(statistics.tokens) == 6
    assert torch.equal(torch.cat([statistics.tokens, rehearsed.tokens]), calibration.tokens)
    single = CalibrationSet.from_tokens(calibration.tokens[:1])
    assert all(torch.equal(part.tokens, single.tokens) for part in split(single))
