"""The room's loop: what each mode shows the methods, what is recorded, what memory it takes, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.live_bytes import LiveBytes
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CompositionError, ConfigError, DataError, NumericsError
from trimtab.core.recipe import Recipe
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView, ModelView
from trimtab.weights.gptq import Gptq
from trimtab.weights.rtn import Rtn

GPTQ = Gptq(bits=3, group_size=16)


def quietly(model: PreTrainedModel, method: Any, calibration: CalibrationSet | None = None, **settings: Any) -> Any:
    return tt.compress(model, method, calibration=calibration, progress=False, **settings)


def site_grams(model: PreTrainedModel, data: CalibrationSet) -> dict[str, Tensor]:
    """Gram matrix of each site from the model's own forward pass."""
    grams: dict[str, Tensor] = {}
    hooks = []
    for linear in ModelView.of(model).linears:

        def keep(module: Any, arguments: tuple[Tensor, ...], site: str = linear.site) -> None:
            x = arguments[0].double().flatten(0, -2)
            grams[site] = (x.T @ x / len(x)).float()

        hooks.append(linear.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=data.tokens)
    for hook in hooks:
        hook.remove()
    return grams


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stats]:
    """Statistics that gptq was given, by linear."""
    seen: dict[str, Stats] = {}
    own = Gptq.compress

    def record(self: Gptq, linear: LinearView, stats: Stats | None) -> Any:
        assert stats is not None
        seen[linear.name] = stats
        return own(self, linear, stats)

    monkeypatch.setattr(Gptq, "compress", record)
    return seen


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_each_mode_shows_the_inputs_it_promises(
    family: str, mode: str, calibration: CalibrationSet, shown: dict[str, Stats]
) -> None:
    """Dense: inputs in the original model. Sequential: inputs in the finished model, for its linears come later."""
    model = random_model(family)
    original = site_grams(model, calibration)
    quietly(model, GPTQ, calibration, mode=mode)
    finished = site_grams(model, calibration)
    expected, other = (original, finished) if mode == "dense" else (finished, original)
    sites = {linear.name: linear.site for linear in ModelView.of(model).linears}
    assert set(shown) == set(sites)
    for name, stats in shown.items():
        assert stats.count == calibration.count
        wanted = expected[sites[name]]
        torch.testing.assert_close(stats.gram, wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().mean()))
    last = f"layers.{len(ModelView.of(model).blocks) - 1}.mlp_out"
    assert float((expected[last] - other[last]).norm() / expected[last].norm()) > 0.01  # the modes differ


def test_linears_of_one_site_see_the_same_statistics(calibration: CalibrationSet, shown: dict[str, Stats]) -> None:
    quietly(random_model("llama"), GPTQ, calibration)
    q, k, v = (shown[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv")
    assert q is k is v


def test_gptq_keeps_the_logits_better_than_rtn(calibration: CalibrationSet) -> None:
    model = random_model("llama", num_hidden_layers=3)
    tokens = torch.randint(3, 131, (4, 24), generator=torch.Generator().manual_seed(99))
    errors = {}
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
        for name, method in {"rtn": Rtn(bits=3, group_size=16), "gptq": GPTQ}.items():
            logits = quietly(copy.deepcopy(model), method, calibration)(input_ids=tokens).logits
            errors[name] = float((logits - dense).square().mean())
    assert errors["gptq"] < errors["rtn"]


def test_the_record_tells_what_was_done(calibration: CalibrationSet) -> None:
    model = quietly(random_model("llama"), GPTQ, calibration, seed=3)
    record = model.trimtab.record
    assert record.command == "compress"
    assert record.seed == 3
    assert record.config["recipe"] == Recipe.of(GPTQ).to_dict() == model.trimtab.recipe.to_dict()
    assert record.config["mode"] == "sequential"
    assert record.config["calibration"] == {
        "source": "random tokens",
        "sha256": calibration.sha256,
        "sequences": 8,
        "length": 24,
        "tokens": 192,
    }
    assert {"total", "calibration", "solve"} <= set(record.seconds)
    entry = record.changed[0]
    assert entry["linear"] == "model.layers.0.self_attn.q_proj"
    assert {"role", "shape", "nbytes", "relative_error", "relative_weight_error", "damping", "gptq_loss"} <= set(entry)
    assert [e["linear"] for e in record.changed] == [linear.name for linear in ModelView.of(model).linears]
    assert record.metrics["resumed_blocks"] == 0


def test_a_method_without_needs_reads_no_data() -> None:
    model = quietly(random_model("llama"), Rtn(group_size=16))
    assert model.trimtab.record.config["calibration"] is None
    assert "calibration" not in model.trimtab.record.seconds


def test_calibration_text_is_cut_to_the_models_context(tmp_path: Path) -> None:
    from calibration.test_calibration_set import TEXT, word_tokenizer

    model = random_model("llama", vocab_size=501)
    with pytest.raises(ConfigError, match="tokenizer"):
        quietly(model, GPTQ)
    tt.models.info_of(model).tokenizer = word_tokenizer()
    (tmp_path / "corpus.txt").write_text(TEXT)
    quietly(model, GPTQ, tmp_path / "corpus.txt")
    found = model.trimtab.record.config["calibration"]
    assert (found["sequences"], found["length"], found["source"]) == (3, 128, str(tmp_path / "corpus.txt"))


def test_the_grid_of_biases_and_fused_layers() -> None:
    """GPT-2 stores weights transposed and with biases: the compressed layer stands for the same map."""
    model = random_model("gpt2")
    linears = {linear.name: (linear.weight.clone(), linear.bias.clone()) for linear in ModelView.of(model).linears}
    quietly(model, Rtn(bits=8, group_size=16))
    for name, (weight, bias) in linears.items():
        module = model.get_submodule(name)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(module(x), x @ weight.T + bias, rtol=0.05, atol=0.05)


def test_progress_is_silent_when_not_asked_for(calibration: CalibrationSet, capfd: pytest.CaptureFixture[str]) -> None:
    quietly(random_model("llama"), GPTQ, calibration)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# memory


@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_memory_does_not_grow_with_depth_beyond_the_result(mode: str) -> None:
    """New tensors alive at once: the compressed layers, one block's statistics and the hidden states."""
    tokens = torch.randint(3, 131, (8, 32), generator=torch.Generator().manual_seed(0))
    data = CalibrationSet.from_tokens(tokens)

    method = Gptq(bits=3, group_size=16, targets=("q_proj", "down_proj"))  # the smallest and the largest Gram matrix

    def measure(layers: int) -> tuple[int, int]:
        model = random_model("llama", num_hidden_layers=layers, intermediate_size=256)
        with LiveBytes([*model.parameters(), *model.buffers(), data.tokens, data.mask]) as live:
            quietly(model, method, data, mode=mode)
        return live.peak, sum(m.tensor.nbytes for m in model.modules() if isinstance(m, CompressedLinear))

    (peak, result), (deep_peak, deep_result) = measure(2), measure(4)
    gram = 256 * 256 * 4
    assert peak > gram + result
    assert deep_peak - peak < (deep_result - result) + gram / 8


def test_replaced_weights_are_freed_as_it_goes(calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", num_hidden_layers=4)
    weights = {linear.name: weakref.ref(linear.module.weight) for linear in ModelView.of(model).linears}
    alive: list[int] = []
    own = Gptq.compress

    def count(self: Gptq, linear: LinearView, stats: Stats | None) -> Any:
        alive.append(sum(weight() is not None for weight in weights.values()))
        return own(self, linear, stats)

    monkeypatch.setattr(Gptq, "compress", count)
    quietly(model, GPTQ, calibration)
    # 7 linears a block; those of the current block may live until it is finished
    assert alive[::7] == [28, 21, 14, 7]


# refusals


def expect_unchanged(model: PreTrainedModel, act: Callable[[], object], error: type[Exception], match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        act()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(7), after[key].nan_to_num(7)) for key in before)


@pytest.mark.parametrize("method", [Rtn(group_size=16), GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_weights_are_refused_by_name(method: Any, bad: float, calibration: CalibrationSet) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    match = r"weight of model\.layers\.1\.mlp\.up_proj holds .* the first at row 3, column 5"
    expect_unchanged(model, lambda: quietly(model, method, calibration), NumericsError, match)


@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_non_finite_activations_are_refused_by_name(mode: str, calibration: CalibrationSet) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = torch.inf
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.q_proj \(site layers\.1\.attention_in\)"):
        quietly(model, GPTQ, calibration, mode=mode)


def test_unknown_mode_is_refused(calibration: CalibrationSet) -> None:
    model = random_model("llama")
    expect_unchanged(model, lambda: quietly(model, GPTQ, calibration, mode="sparse"), ConfigError, "dense, sequential")


def test_recipes_without_a_step_of_this_room_or_with_too_many_are_refused() -> None:
    model = random_model("llama")
    expect_unchanged(
        model, lambda: quietly(model, Recipe(())), ConfigError, "at least one method of the rooms weights and layers"
    )
    with pytest.raises(CompositionError, match="already compressed by 'rtn'"):
        Recipe.of(Rtn(), GPTQ)


def test_calibration_beyond_the_context_is_refused() -> None:
    model = random_model("llama")
    data = CalibrationSet.from_tokens(torch.ones(2, 300, dtype=torch.int64))
    expect_unchanged(model, lambda: quietly(model, GPTQ, data), DataError, "longer than the model's context of 128")


def test_padding_is_left_out_of_the_statistics(calibration: CalibrationSet) -> None:
    """Sequences padded on the right give the same result whatever stands at the padding."""
    mask = calibration.mask.clone()
    mask[::2, 15:] = False
    results = []
    for filler in (5, 77):
        tokens = calibration.tokens.masked_fill(~mask, filler)
        results.append(quietly(random_model("llama"), GPTQ, CalibrationSet.from_tokens(tokens, mask)).state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTQ.bits = 2  # type: ignore[misc]
