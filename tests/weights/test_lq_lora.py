"""LQ-LoRA: the invariants of the method, each also shown to notice a broken variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.models import fisher
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.metric import Metric
from trimtab.tensors.nested_scales import NestedFormat, NestedScales
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights.lq_lora import Decomposition, LqLora, decompose

FORMAT = TableFormat(bits=2, group_size=64, nested=NestedFormat())


def structured(size: int = 256) -> Tensor:
    """Gaussian, with a part of rank 8 that holds most of it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((size, 8), (8, size)))
    return noise + 1.5 * left @ right


def weighted(seed: int = 1, out: int = 96, width: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and uneven row and column weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    return weight, torch.randn(out, generator=generator).exp(), (2 * torch.randn(width, generator=generator)).exp()


def run(weight: Tensor, metric: Metric | None = None, rank: int = 16, iterations: int = 10) -> Decomposition:
    metric = metric or Metric.identity()
    first = svd(weight, rank, metric, dtype=torch.float16)
    return decompose(weight, metric, FORMAT, first, iterations=iterations)


def product(found: Decomposition) -> Tensor:
    return found.low_rank.dequantize()


# 1: the integer program, on the costs of a model


def plan_of(calibration: CalibrationSet, budget_bits: float, **options: Any) -> dict[str, Any]:
    method = LqLora(budget_bits=budget_bits, rank=2, iterations=1, **options)
    model = tt.compress(random_model("llama"), method, calibration=calibration, progress=False)
    plan: dict[str, Any] = model.trimtab.record.metrics["plan"]
    assert plan["planned_bytes"] <= plan["budget_bytes"]
    factors = sum(entry["shape"][0] * 4 + entry["shape"][1] * 4 for entry in model.trimtab.record.changed)
    assert model.trimtab.record.ledger["compressed_bytes"] == plan["planned_bytes"] + factors
    return plan


def test_the_program_beats_uniform_configurations_and_more_bits_cost_less(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = list(LqLora().formats())
    costs = []
    for bits in (3, 4):
        uniform = next(f for f in formats if f.bits == bits and f.group_size == 16)
        with monkeypatch.context() as patch:
            patch.setattr(LqLora, "formats", lambda self, only=uniform: (only,))
            one = plan_of(calibration, 9.0)
        mixture = plan_of(calibration, one["bits_per_weight"])
        assert mixture["sum_of_costs"] <= one["sum_of_costs"]
        costs.append(mixture["sum_of_costs"])
    assert costs[1] < costs[0]


def test_a_budget_below_the_smallest_is_refused_and_named(calibration: CalibrationSet, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"smallest possible is budget_bits=2\.\d+ ") as refused:
        tt.compress(
            random_model("llama"), LqLora(budget_bits=1.5, rank=2), calibration=calibration, state_dir=tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()
    smallest = float(str(refused.value).split("smallest possible is budget_bits=")[1].split()[0])
    assert plan_of(calibration, smallest)["bits_per_weight"] == pytest.approx(smallest, abs=1e-4)


# 2 and 3: the weights of errors


def test_equal_weights_are_no_weights() -> None:
    weight, rows, columns = weighted()
    plain = run(weight)
    even = run(weight, Metric.row_column(torch.full_like(rows, 0.3), torch.full_like(columns, 7.0)))
    assert torch.equal(plain.quantized.codes(), even.quantized.codes())
    torch.testing.assert_close(product(plain), product(even), rtol=1e-3, atol=1e-3)


def test_the_scale_of_the_fisher_does_not_matter() -> None:
    weight, rows, columns = weighted()
    expected = run(weight, Metric.row_column(rows, columns))
    for scale in (2.0**-40, 2.0**20):
        found = run(weight, Metric.row_column(scale * rows, columns))
        assert torch.equal(found.quantized.codes(), expected.quantized.codes())
        assert torch.equal(product(found), product(expected))
    shifted = run(weight, Metric.row_column(rows + 1, columns))  # a broken variant: no gauge is left
    assert not torch.equal(shifted.quantized.codes(), expected.quantized.codes())


def alternating(weight: Tensor, rows: Tensor, columns: Tensor, rank: int) -> float:
    """The weighted low-rank error that alternating least squares comes to; each half step is exact."""
    target = (rows.sqrt()[:, None] * weight * columns.sqrt()).double()
    right = torch.randn(rank, weight.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(300):
        left = target @ torch.linalg.pinv(right)
        right = torch.linalg.pinv(left) @ target
    return float((target - left @ right).square().sum())


def test_the_weighted_decomposition_is_the_true_optimum_for_a_rank_one_fisher() -> None:
    weight, rows, columns = weighted(out=40, width=56)
    truth = Metric.row_column(rows, columns)
    expected = alternating(weight, rows, columns, 6)
    found = truth.squared_norm(weight - svd(weight, 6, truth).dequantize())
    assert found == pytest.approx(expected, rel=1e-4)
    # broken variants: no weights at all, and weights in place of their roots
    for metric in (Metric.identity(), Metric.row_column(rows.square(), columns.square())):
        assert truth.squared_norm(weight - svd(weight, 6, metric).dequantize()) > 1.05 * expected


def test_weights_lower_the_weighted_error() -> None:
    weight, rows, columns = weighted()
    metric = Metric.row_column(rows, columns)
    left = [weight - d.quantized.dequantize() - product(d) for d in (run(weight, metric), run(weight))]
    assert metric.squared_norm(left[0]) < 0.9 * metric.squared_norm(left[1])


def test_dead_rows_and_columns_are_no_division_by_zero() -> None:
    weight, rows, columns = weighted()
    rows[3], columns[5:9] = 0, 0
    found = run(weight, Metric.row_column(rows, columns))
    assert bool(torch.isfinite(product(found)).all())
    dead = run(weight, Metric.row_column(torch.zeros_like(rows), torch.zeros_like(columns)))
    assert bool(torch.isfinite(dead.quantized.dequantize()).all())


# 4: exactness


def test_full_rank_is_exact_and_codes_come_back_to_the_bit() -> None:
    weight, rows, columns = weighted()
    exact = svd(weight, 96, Metric.row_column(rows, columns)).dequantize()
    torch.testing.assert_close(exact, weight, rtol=1e-4, atol=1e-4)
    found = run(weight)
    tensor = CompressedTensor(parts=(found.quantized, found.low_rank))
    again = CompressedTensor.from_state(tensor.spec(), tensor.state())
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert torch.equal(found.quantized.project(found.quantized.dequantize()).dequantize(), found.quantized.dequantize())


# 5: low rank first


def quantizer_first(weight: Tensor, rank: int, turns: int) -> float:
    """The order of LoftQ, here a broken variant: the best relative error of its turns."""
    low_rank, errors = torch.zeros_like(weight), []
    for _ in range(turns):
        quantized = LevelTable.quantize(weight - low_rank, FORMAT).dequantize()
        low_rank = svd(weight - quantized, rank).dequantize()
        errors.append(float((weight - quantized - low_rank).norm() / weight.norm()))
    return min(errors)


def test_low_rank_first_finds_a_dominant_low_rank_part() -> None:
    weight = structured()
    plain = float((weight - LevelTable.quantize(weight, FORMAT).dequantize()).norm() / weight.norm())
    found = run(weight)
    best = min(found.errors)
    assert best < 0.5 * quantizer_first(weight, 16, 10)
    assert best < 0.35 * plain
    assert best < found.errors[0]


def test_the_best_turn_is_returned_and_the_first_rise_ends_it() -> None:
    weight = structured()
    found = run(weight, iterations=100)
    assert len(found.errors) < 100
    assert found.turn == len(found.errors) - 1
    assert found.errors[-1] >= min(found.errors) == found.errors[found.turn - 1]
    left = weight - found.quantized.dequantize() - product(found)
    assert float(left.norm() / weight.norm()) == pytest.approx(min(found.errors), rel=1e-5)
    assert all(later < earlier for earlier, later in zip(found.errors, found.errors[1:-1], strict=False))


def test_the_quantizer_sees_what_the_stored_factors_leave() -> None:
    weight = structured()
    found = run(weight)
    assert found.low_rank.left.dtype == torch.float16
    assert torch.equal(LevelTable.quantize(weight - product(found), FORMAT).codes(), found.quantized.codes())
    wide = LowRank(
        found.low_rank.left.float() * 1.001, found.low_rank.right.float()
    )  # broken: other factors are stored
    assert not torch.equal(LevelTable.quantize(weight - wide.dequantize(), FORMAT).codes(), found.quantized.codes())


def test_polishing_never_raises_the_error() -> None:
    weight, rows, columns = weighted()
    metric = Metric.row_column(rows, columns)
    found = run(weight, metric)
    rest = weight - found.quantized.dequantize()
    polished = svd(rest, 16, metric, dtype=torch.float16).dequantize()
    assert metric.squared_norm(rest - polished) <= metric.squared_norm(rest - product(found)) * (1 + 1e-4)


# 6: double quantization


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_within_half_a_step_and_not_below_the_offset(bits: Any) -> None:
    found = decompose(
        structured(),
        Metric.identity(),
        dataclasses.replace(FORMAT, nested=NestedFormat(bits=bits, block_size=64)),
        svd(structured(), 16, dtype=torch.float16),
        iterations=2,
    )
    nested = found.quantized.stored_scales
    assert isinstance(nested, NestedScales)
    target = structured() - product(found)
    exact = target.reshape(256, 4, 64).abs().amax(dim=2)
    step = nested.maxima.float().repeat_interleave(64).reshape(exact.shape) / ((1 << bits) - 1)
    off = (nested.values() - exact).abs()
    assert bool((off <= step / 2 * (1 + 1e-4)).all())
    assert bool((nested.values() >= nested.offset).all())
    assert bool((off > step / 8).any())  # the bound says something: an eighth of a step would be too little


# options and planning


def test_the_grid_of_configurations() -> None:
    every = list(LqLora(configurations="all").formats())
    assert len(every) == len(set(map(repr, every))) == 432
    few = list(LqLora().formats())
    assert len(few) == 24
    assert set(map(repr, few)) <= set(map(repr, every))


def test_statistics_and_costs_are_remembered(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = LqLora(rank=2, budget_bits=4.0)
    first = tt.compress(random_model("llama"), method, calibration=calibration, state_dir=tmp_path, progress=False)
    monkeypatch.setattr(fisher, "fisher_information", lambda *args, **kwargs: pytest.fail("asked again"))
    monkeypatch.setattr(LqLora, "_costs", lambda *args: pytest.fail("measured again"))
    again = tt.compress(random_model("llama"), method, calibration=calibration, state_dir=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{"exact_costs": True}, {"weighting": "none"}, {"configurations": "all"}], ids=str)
def test_options_change_the_choice_and_notes_name_it(calibration: CalibrationSet, options: dict[str, Any]) -> None:
    method = LqLora(rank=2, budget_bits=4.0, iterations=2, targets=("o", "down"), **options)
    model = tt.compress(random_model("llama"), method, calibration=calibration, progress=False)
    for entry in model.trimtab.record.changed:
        assert entry["bits"] in (2, 3, 4, 8)
        assert entry["group_size"] == 16
        assert entry["error"] <= entry["first_error"]
    assert model.trimtab.record.metrics["plan"]["bits_per_weight"] <= 4.0


def test_options_that_cannot_be_are_refused(calibration: CalibrationSet) -> None:
    for options, name in (
        ({"budget_bits": 0.0}, "budget_bits"),
        ({"rank": -1}, "rank"),
        ({"iterations": 0}, "iterations"),
        ({"exact_costs": True, "weighting": "none"}, "exact_costs"),
    ):
        with pytest.raises(ConfigError, match=name):
            LqLora(**options)
    with pytest.raises(TargetError, match="rank=64 for a weight of shape"):
        tt.compress(random_model("llama"), LqLora(), calibration=calibration, progress=False)
    with pytest.raises(TargetError, match="is 50 wide"):
        model = random_model("llama", hidden_size=50, num_attention_heads=5, num_key_value_heads=5)
        LqLora(rank=2).check_targets(ModelView.of(model).linears)
