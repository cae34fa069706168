"""QLLM: exact splitting, the error of merging in closed form, the searched threshold, corrections that merge."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError, NumericsError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.reindex import Reindex
from trimtab.weights._error_correction import CorrectedLinear, _corrected
from trimtab.weights._reassembly import matched, pair_costs, reassembled, shares, thresholds
from trimtab.weights.qllm import Qllm
from trimtab.weights.rtn import Rtn


def toy(outliers: int = 4, *, width: int = 64, rows: int = 48, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """Inputs with a few channels 10 to 40 times larger than the others, and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    places = torch.randperm(width, generator=generator)[:outliers]
    x[:, places] *= torch.linspace(10, 40, outliers)
    return x, torch.randn(rows, width, generator=generator) / width**0.5


def error(x: Tensor, weight: Tensor, tensor: CompressedTensor) -> float:
    exact = x @ weight.t()
    return float((tensor.matmul(x) - exact).square().sum() / exact.square().sum())


# Disassembly and assembly


@pytest.mark.parametrize("threshold", [0.5, 3.0, 20.0])
def test_shares_never_exceed_the_threshold_and_lose_nothing(threshold: float) -> None:
    x, weight = toy()
    parts = shares(x.abs().amax(0), threshold)
    split = Reindex.of(64, [([j], int(parts[j])) for j in range(64) for _ in range(int(parts[j]))])
    assert float(split.apply(x).abs().max()) <= threshold * (1 + 1e-6)
    assert torch.allclose(split.apply(x) @ split.expand(weight).t(), x @ weight.t(), atol=1e-3)


def test_merging_one_pair_errs_by_its_cost() -> None:
    x, weight = toy(outliers=0)
    costs = pair_costs(x, weight)
    for even, odd in ((0, 1), (10, 7), (62, 63)):
        members = [([j], 1) for j in range(64) if j not in (even, odd)] + [([even, odd], 1)]
        pair = Reindex.of(64, members)
        lost = (x @ weight.t() - pair.apply(x) @ pair.expand(weight).t()).square().sum()
        assert float(costs[even // 2, odd // 2]) == pytest.approx(float(lost), rel=1e-3)


def test_several_pairs_err_by_no_more_than_their_roots_add_to() -> None:
    x, weight = toy()
    largest, costs = x.abs().amax(0), pair_costs(x, weight)
    reindex = reassembled(largest, 20.0, costs)
    assert reindex is not None
    lost = (x @ weight.t() - reindex.apply(x) @ reindex.expand(weight).t()).norm()
    matching = matched(costs, shares(largest, 20.0) > 1)
    added = int((shares(largest, 20.0) - 1).sum())
    bound = costs[matching.even[:added] // 2, matching.odd[:added] // 2].sqrt().sum()
    if len(set(matching.odd[:added].tolist())) == added:
        assert 0 < float(lost) <= float(bound) * 1.001


def test_the_width_stays_and_split_channels_are_never_merged() -> None:
    x, weight = toy()
    largest = x.abs().amax(0)
    for threshold in (20.0, 40.0, 80.0):
        reindex = reassembled(largest, threshold, pair_costs(x, weight))
        assert reindex is not None
        assert reindex.width == 64
        parts = shares(largest, threshold)
        lengths = reindex.offsets[1:] - reindex.offsets[:-1]
        for row in range(64):
            members = reindex.columns[reindex.offsets[row] : reindex.offsets[row + 1]].long()
            if int(reindex.splits[row]) > 1:
                assert len(members) == 1
                assert int(parts[members[0]]) == int(reindex.splits[row])
            else:
                assert bool((parts[members] == 1).all())
        assert sorted(set(reindex.columns.tolist())) == list(range(64))
        assert int(lengths.sum()) == 64 + int((parts - 1).sum())


def test_nothing_to_split_and_too_much_to_merge() -> None:
    x, weight = toy()
    largest, costs = x.abs().amax(0), pair_costs(x, weight)
    assert reassembled(largest, float(largest.max()), costs) is None
    assert reassembled(largest, 0.05, costs) is None
    tried = thresholds(largest)
    assert float(tried[0]) < float(largest.max())
    assert len(tried) >= 99


def test_partners_are_the_cheapest_and_ties_go_to_the_lower_channel() -> None:
    costs = torch.tensor([[2.0, 2.0], [1.0, 3.0]])
    found = matched(costs, torch.zeros(4, dtype=torch.bool))
    assert found.even.tolist() == [2, 0]
    assert found.odd.tolist() == [1, 1]
    assert matched(costs, torch.tensor([False, True, True, False])).odd.tolist() == [3]


def test_rounded_with_outliers_the_error_is_halved_at_the_same_width() -> None:
    x, weight = toy(outliers=5, width=256, rows=192)
    method = Qllm(bits=4, activation_bits=4)
    largest, costs = x.abs().amax(0), pair_costs(x, weight)
    found = [
        error(x, weight, method.rounded(weight, reassembled(largest, float(t), costs)))
        for t in thresholds(largest)
        if int((shares(largest, float(t)) - 1).sum()) <= 0.2 * 256
    ]
    assert min(found) < 0.5 * error(x, weight, method.rounded(weight, None))


# The method


QUICK = {"search_sequences": 1, "epochs": 1, "rank": 2}


def loud(factor: float = 25.0) -> PreTrainedModel:
    """A model with a few loud channels in front of each MLP and attention."""
    model = random_model("llama")
    with torch.no_grad():
        for block in ModelView.of(model).blocks:
            for part in (block.attention, block.mlp):
                part.norm.weight[3::17] *= factor
    return model


def test_the_chosen_threshold_is_never_worse_than_none(calibration: CalibrationSet) -> None:
    model = tt.compress(loud(), Qllm(**{**QUICK, "rank": 0}), calibration=calibration, progress=False)
    entries = [entry for entry in model.trimtab.record.changed if "search_error" in entry]
    assert entries
    assert all(entry["search_error"] <= entry["search_error_unsplit"] for entry in entries)
    assert any(entry["added_channels"] > 0 for entry in entries)
    assert all(entry["added_channels"] <= 0.2 * 112 for entry in entries)
    for entry in model.trimtab.record.changed:
        layer = model.get_submodule(entry["linear"])
        assert isinstance(layer, CompressedLinear)
        assert layer.tensor.parts[0].shape[1] == layer.in_features
        if entry["role"] == "o":
            assert isinstance(layer.tensor.transform, ActivationGrid)
    shared = {
        e["linear"]: e.get("split_threshold") for e in model.trimtab.record.changed if e["role"] in ("q", "k", "v")
    }
    assert len({shared[name] for name in shared if ".0." in name}) == 1


def test_without_splitting_it_is_rounding_of_weights_and_inputs(calibration: CalibrationSet) -> None:
    plain = Qllm(bits=4, activation_bits=8, channel_ratio=0.0, rank=0)
    model = tt.compress(random_model("llama"), plain, calibration=calibration, progress=False)
    rounded = tt.compress(random_model("llama"), Rtn(bits=4, group_size=-1, activation_bits=8), progress=False)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, rounded(input_ids=tokens).logits)


def test_splitting_helps_a_model_with_loud_channels(calibration: CalibrationSet) -> None:
    original = loud()
    tokens = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = original(input_ids=tokens).logits
        errors = []
        for ratio in (0.0, 0.3):
            method = Qllm(bits=8, activation_bits=4, channel_ratio=ratio, rank=0, search_sequences=4)
            model = tt.compress(loud(), method, calibration=calibration, progress=False)
            errors.append(float((model(input_ids=tokens).logits - exact).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_correction_lowers_the_error_of_its_units(calibration: CalibrationSet) -> None:
    method = Qllm(bits=3, activation_bits=8, rank=4, epochs=3, learning_rate=2e-3, unit_blocks=1)
    model = tt.compress(random_model("llama"), method, calibration=calibration, progress=False)
    told = model.trimtab.record.metrics["tuning"]
    units = [name for name in told if name.endswith("_before")]
    assert len(units) == 2
    assert all(told[name.removesuffix("_before")] < told[name] for name in units)
    assert "model.layers.0.input_layernorm.weight" in model.trimtab.record.changed_dense


def test_what_is_trained_is_what_is_stored() -> None:
    """Before and after merging the rounded weight is the same, bit for bit."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    method = Qllm(bits=4, rank=3)
    layer = CompressedLinear(
        method.rounded(weight, Reindex.of(32, [([0, 1], 1), ([2], 2), ([2], 2)] + [([j], 1) for j in range(3, 32)]))
    )
    corrected = CorrectedLinear(layer, weight, method, torch.Generator().manual_seed(1))
    assert torch.equal(corrected.merged().parts[0].dequantize(), layer.tensor.parts[0].dequantize())
    with torch.no_grad():
        corrected.left.normal_(generator=torch.Generator().manual_seed(2))
    merged = corrected.merged()
    assert merged.spec() == layer.spec
    assert not torch.equal(merged.parts[0].dequantize(), layer.tensor.parts[0].dequantize())
    x = torch.randn(5, 32)
    layer.set_tensor(merged)
    assert torch.allclose(corrected(x), layer(x), atol=1e-5)
    part = merged.parts[0]
    assert torch.equal(part.project(part.dequantize()).dequantize(), part.dequantize())


def test_gradients_pass_both_roundings() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    method = Qllm(bits=2, rank=2)
    corrected = CorrectedLinear(CompressedLinear(method.rounded(weight, None)), weight, method, torch.Generator())
    x = torch.randn(3, 16, requires_grad=True)
    corrected(x).sum().backward()
    assert corrected.left.grad is not None
    assert float(corrected.left.grad.abs().sum()) > 0
    assert x.grad is not None
    expected = GroupGrid.quantize(weight, GridFormat(bits=2, group_size=-1, symmetric=False)).dequantize().sum(0)
    assert torch.allclose(x.grad, expected.expand(3, -1), atol=1e-5)


def test_everything_is_put_back_after_an_error(calibration: CalibrationSet) -> None:
    model = tt.compress(random_model("llama"), Qllm(**{**QUICK, "rank": 0}), calibration=calibration, progress=False)
    tuning = SimpleNamespace(model=model, teacher=random_model("llama"))
    before = dict(model.named_modules())
    corrected = _corrected(Qllm(**QUICK), tuning, ModelView.of(model).blocks, torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(NumericsError), corrected:
        raise NumericsError("stop")
    assert dict(model.named_modules()) == before
    assert all(
        parameter.requires_grad == other.requires_grad
        for parameter, other in zip(model.parameters(), tuning.model.parameters(), strict=True)
    )


def test_options_that_cannot_be_are_refused() -> None:
    for options, words in (
        ({"channel_ratio": 0.7}, "at most half"),
        ({"epochs": 0}, "epochs=0"),
        ({"rank": -1}, "rank=-1"),
    ):
        with pytest.raises(ConfigError, match=words):
            Qllm(**options)
