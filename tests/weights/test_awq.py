"""AWQ: folding is exact, the search is never worse than rounding, clipping is the best of its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError
from trimtab.evaluation.outliers import inject_outliers
from trimtab.models.calibration import BlockStream
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.folding import NormFold, RowFold
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.weights import awq
from trimtab.weights.awq import Awq, clip_limits, relative_size
from trimtab.weights.rtn import Rtn

TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))
ATTENTION, MLP = ("q", "k", "v"), ("gate", "up")


def outlier_model(**options: Any) -> PreTrainedModel:
    model = random_model("llama", num_key_value_heads=4, **options)
    inject_outliers(model, channels=4)
    return model


def compress(model: PreTrainedModel, method: Any, calibration: CalibrationSet, **settings: Any) -> PreTrainedModel:
    return tt.compress(model, method, calibration=calibration, progress=False, **settings)


def entries(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    return {entry["linear"]: entry for entry in model.trimtab.record.changed}


def module_error(method: Any, calibration: CalibrationSet) -> float:
    """Error of the first block's attention or MLP on the calibration text, relative to its output."""
    model = outlier_model(num_hidden_layers=1)
    part = "attention" if method.targets == ATTENTION else "mlp"

    def output() -> Tensor:
        view = ModelView.of(model)
        block = view.blocks[0]
        calls = BlockStream(view, calibration).capture(block, getattr(block, part).module, sequences=100)
        return torch.cat([call.output[call.mask] for call in calls])

    before = output()
    compress(model, method, calibration)
    return float((output() - before).square().sum() / before.square().sum())


def never_worse_than_rtn(calibration: CalibrationSet) -> bool:
    """Also strictly better, by far, for these models have outliers. The search sees all of the text here."""
    shared: dict[str, Any] = {"bits": 3, "group_size": 16}
    found = [
        (
            module_error(Awq(targets=t, shrink=False, **shared), calibration),
            module_error(Rtn(targets=t, **shared), calibration),
        )
        for t in (ATTENTION, MLP)
    ]
    return all(ours < 0.7 * rtn for ours, rtn in found)


def test_the_search_beats_rounding_at_every_norm(calibration: CalibrationSet) -> None:
    assert never_worse_than_rtn(calibration)


def without_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormFold, "divided", lambda self, scale: {})


def with_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    right = awq.relative_output_error
    monkeypatch.setattr(awq, "relative_output_error", lambda calls: -right(calls))


def with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates are never put into the module, so all outputs are equal and the first, s = 1, is kept."""
    monkeypatch.setattr(awq, "relative_output_error", lambda calls: 0.0)


@pytest.mark.parametrize("broken", [without_fold, with_the_worst, with_the_same_weights])
def test_the_search_check_notices_a_broken_variant(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    broken(monkeypatch)
    assert not never_worse_than_rtn(calibration)


def test_errors_of_the_search_are_reported(calibration: CalibrationSet) -> None:
    found = entries(compress(outlier_model(), Awq(bits=3, group_size=16, shrink=False), calibration, mode="dense"))
    rtn = entries(compress(outlier_model(), Rtn(bits=3, group_size=16), calibration))
    for name, entry in found.items():
        assert entry["search_error"] <= entry["search_error_unscaled"]
        role = name.rpartition(".")[2]
        if role in ("o_proj", "down_proj"):
            assert entry["search_error"] == pytest.approx(entry["relative_error"], rel=1e-3)
            assert entry["relative_error"] < 0.7 * entry["search_error_unscaled"]
    assert sum(e["relative_error"] for e in found.values()) < sum(e["search_error_unscaled"] for e in found.values())
    assert sum(e["relative_weight_error"] for e in found.values()) > sum(
        e["relative_weight_error"] for e in rtn.values()
    )


@pytest.mark.parametrize("scaling", ["duo", "plain"])
def test_not_scaling_is_among_the_candidates(scaling: Any) -> None:
    """Where all channels are alike it wins or ties; a dead channel or group does not spoil the others."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 16:] = 0
    mean_abs = torch.rand(32, generator=torch.Generator().manual_seed(1))
    mean_abs[[0, 5]] = 0
    found = Awq(scaling=scaling, group_size=16)._candidates(mean_abs, [weight])
    assert bool((next(iter(found.values())) == 1).all())
    assert len(found) == 21
    assert all(bool((torch.isfinite(scale) & (scale > 0)).all()) for scale in found.values())
    wide = found["0.50"]
    assert float(wide.max() * wide.min()) == pytest.approx(1, rel=1e-4)


def test_relative_size_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0, 0.0], [4.0, 1.0, 3.0, -6.0]])
    assert relative_size(weight, 2).tolist() == [(0.5 + 1) / 2, (1 + 0.25) / 2, 0.25, 0.5]


def beside_rtn(family: str, calibration: CalibrationSet, **options: Any) -> float:
    """Change of the logits at 8 bits, as a multiple of what rounding alone changes."""
    changes = []
    for method in (Awq(bits=8, group_size=16), Rtn(bits=8, group_size=16)):
        model = random_model(family, **options)
        if family not in ("opt", "gpt2", "gpt_neox"):
            inject_outliers(model, channels=4)
        with torch.no_grad():
            before = model(input_ids=TOKENS).logits
            compress(model, method, calibration)
            changes.append(float((model(input_ids=TOKENS).logits - before).norm()))
    return changes[0] / changes[1]


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen2", {"num_key_value_heads": 4}),
    ("gemma2", {}),
    ("phi3", {"num_key_value_heads": 4}),
    ("opt", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
]


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=str)
def test_scales_and_their_inverses_meet_in_every_family(
    family: str, options: dict[str, Any], calibration: CalibrationSet
) -> None:
    assert beside_rtn(family, calibration, **options) < 1.5


def test_the_check_notices_biases_that_are_not_scaled(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowFold, "divided_bias", lambda self, scale: {})
    assert beside_rtn("qwen2", calibration, num_key_value_heads=4) > 1.5


def test_the_check_notices_rows_that_are_not_divided(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowFold, "rescaled", lambda self, weight, scale: weight)
    assert beside_rtn("llama", calibration) > 1.5


def test_nothing_is_stored_besides_the_grids(calibration: CalibrationSet) -> None:
    ours = compress(outlier_model(), Awq(group_size=16), calibration).state_dict()
    rtn = compress(outlier_model(), Rtn(group_size=16), calibration).state_dict()
    assert {name: (v.shape, v.dtype) for name, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in rtn.items()}


def test_the_original_is_back_before_the_result_is_installed(calibration: CalibrationSet) -> None:
    """The errors of the room are those of the original weights, and dense statistics those of the original block."""
    model = outlier_model()
    compress(model, Awq(group_size=16, bits=8), calibration, mode="dense")
    assert {name.rpartition(".")[2] for name in model.trimtab.record.changed_dense} == {"weight"}
    assert len(model.trimtab.record.changed_dense) == 4
    assert all(entry["relative_weight_error"] < 1e-3 for entry in entries(model).values())


# Clipping


def toy() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 32, generator=generator)
    weight[:, [3, 20]] *= 4  # large weights that little depends on
    x = torch.randn(64, 32, generator=generator)
    x[:, [3, 20]] *= 0.05
    return weight, x


def rounded(weight: Tensor) -> Tensor:
    return GroupGrid.quantize(weight, GridFormat(bits=3, group_size=16, symmetric=False)).dequantize()


def group_errors(weight: Tensor, clipped: Tensor, x: Tensor) -> Tensor:
    """[out, groups], by hand."""
    error = (rounded(clipped) - weight).reshape(5, 2, 16)
    return torch.einsum("ogl,tgl->tog", error, x.reshape(-1, 2, 16)).square().mean(0)


def test_limits_are_the_best_of_all_steps() -> None:
    weight, x = toy()
    limits = clip_limits(weight, x, 16, rounded)
    largest = weight.abs().reshape(5, 2, 16).amax(2)
    steps = [1 - 0.025 * i for i in range(20)]
    tried = torch.stack([group_errors(weight, awq._clipped(weight, largest * p), x) for p in steps])
    torch.testing.assert_close(group_errors(weight, awq._clipped(weight, limits), x), tried.amin(0))
    assert float((tried.amin(0) / tried[0]).mean()) < 0.8
    assert float((limits / largest).min()) >= 0.525 - 1e-6


def test_queries_and_keys_are_not_clipped(calibration: CalibrationSet) -> None:
    for family, names in (("llama", ("q_proj", "k_proj")), ("gpt2", ())):
        options: dict[str, Any] = {"bits": 3, "group_size": 16, "scaling": "none"}
        a, b = (compress(random_model(family), Awq(shrink=s, **options), calibration) for s in (True, False))
        first = ModelView.of(a).blocks[0].linears
        for linear, other in zip(first, ModelView.of(b).blocks[0].linears, strict=True):
            same = (linear.module.dequantize() == other.module.dequantize()).all(1)
            if linear.rows:
                kept = {role: bool(same[rows].all()) for role, rows in linear.rows.items()}
                assert kept == {"q": True, "k": True, "v": False}
            else:
                assert bool(same.all()) == (linear.name.rpartition(".")[2] in names)


# Sites that cannot be scaled


def test_a_norm_with_other_readers_is_left_alone_and_named(calibration: CalibrationSet) -> None:
    options: dict[str, Any] = {"targets": ("q_proj", "down_proj"), "group_size": 16}
    model = compress(outlier_model(), Awq(shrink=False, **options), calibration)
    found = entries(model)
    assert found["model.layers.0.self_attn.q_proj"]["scaling"] == (
        "none: model.layers.0.input_layernorm is also read by model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, which must stay as it is"
    )
    assert found["model.layers.1.mlp.down_proj"]["scaling"] == "none: model.layers.1.mlp.up_proj must stay as it is"
    assert model.trimtab.record.changed_dense == []
    rtn = compress(outlier_model(), Rtn(**options), calibration)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rtn.state_dict().values(), strict=True))


def test_a_finished_run_is_taken_up_with_its_norms(calibration: CalibrationSet, tmp_path: Path) -> None:
    first = compress(outlier_model(), Awq(group_size=16), calibration, state_dir=tmp_path)
    second = compress(outlier_model(), Awq(group_size=16), calibration, state_dir=tmp_path)
    assert second.trimtab.record.metrics["resumed_blocks"] == 2
    assert second.trimtab.record.changed_dense == first.trimtab.record.changed_dense
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="search_sequences=0 must be at least 1"):
        Awq(search_sequences=0)
