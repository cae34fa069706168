"""MoDeGPT on models: what its parts keep, how blocks share the loss, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.counting import ledger_of
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.weights import MoDeGpt
from trimtab.weights._pruning.allocation import softmax
from trimtab.weights._pruning.plan import Plan
from trimtab.weights._pruning.units import neurons, rotary_pairs

TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))
NARROW = ("llama", "mistral", "qwen2", "qwen3")
MLP_ONLY = ("gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox")
UNIFORM: dict[str, Any] = {"allocation": "uniform", "round_to": 1}


def model_of(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model whose head dimension, 16, leaves room for rounding; biased wherever the family can be."""
    if family == "llama":
        overrides = {"attention_bias": True, "mlp_bias": True, **overrides}
    return random_model(family, **({"head_dim": 16} if family in NARROW else {}), **overrides)


def sliced(model: PreTrainedModel, calibration: CalibrationSet, **options: Any) -> PreTrainedModel:
    return tt.compress(model, MoDeGpt(**options), calibration=calibration, progress=False)


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def distance(model: PreTrainedModel, other: PreTrainedModel) -> float:
    exact = logits(other)
    return float((logits(model) - exact).norm() / exact.norm())


def record(model: PreTrainedModel) -> Any:
    return model.trimtab.record


@pytest.mark.parametrize("family", NARROW)
def test_all_parts_become_narrow_and_the_ledger_counts_them(family: str, calibration: CalibrationSet) -> None:
    model = sliced(model_of(family), calibration, sparsity=0.4, **UNIFORM)
    pairs = 8 if family == "qwen3" else 5
    for block in ModelView.of(model).blocks:
        shapes = {linear.role: (linear.out_features, linear.in_features) for linear in block.linears}
        assert shapes == {
            "q": (8 * pairs, 48),
            "k": (4 * pairs, 48),
            "v": (2 * 10, 48),
            "o": (48, 4 * 10),
            "gate": (68, 48),
            "up": (68, 48),
            "down": (48, 68),
        }
    entries = sum(x.out_features * x.in_features for x in ModelView.of(model).linears)
    whole = sum(x.out_features * x.in_features for x in ModelView.of(model_of(family)).linears)
    targets = whole if family != "qwen3" else whole - 2 * (64 + 32) * 48
    assert record(model).metrics["removed_of_targets"] == pytest.approx((whole - entries) / targets)
    ledger = ledger_of(model)
    assert ledger.macs_per_token == entries + 131 * 48
    assert ledger.kv_bytes_per_token == 2 * 2 * (2 * pairs + 10) * 4


@pytest.mark.parametrize("family", NARROW)
def test_a_saved_model_gives_the_same_logits(family: str, calibration: CalibrationSet, tmp_path: Path) -> None:
    model = sliced(model_of(family), calibration, sparsity=0.4, round_to=2)
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


@pytest.mark.parametrize("family", NARROW)
def test_all_value_directions_are_the_same_model(
    family: str, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost where all directions stay, biases included, although every matrix is another one."""
    monkeypatch.setattr("trimtab.weights.modegpt._kept", lambda width, share, multiple: width)
    monkeypatch.setattr(MoDeGpt, "_refuse_nothing", lambda self, removed: None)
    model = model_of(family)
    unchanged = sliced(model, calibration, sparsity=0.4, **UNIFORM)
    assert torch.equal(logits(unchanged), logits(model_of(family)))
    assert record(unchanged).changed == []

    from trimtab.models.narrow import HeadGeometry, narrow_heads, narrow_linear
    from trimtab.models.statistics import Stats
    from trimtab.weights._pruning.narrow_heads import sliced_values

    model = model_of(family)
    for block in ModelView.of(model).blocks:
        by_role = {linear.role: linear for linear in block.linears}
        stats = {by_role["v"].site: Stats(by_role["v"].site, 48, gram=torch.eye(48))}
        made = sliced_values(block, by_role, stats, 16, joint=True)
        assert not torch.allclose(made[by_role["v"].name].weight, by_role["v"].weight, atol=0.1)
        for role in ("v", "o"):
            linear = by_role[role]  # type: ignore[index]
            linear.replace(narrow_linear(linear.module, made[linear.name].weight, made[linear.name].bias))
        narrow_heads(block.attention.module, HeadGeometry(None, 16))
    assert distance(model, model_of(family)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_kept_pairs_are_attention_with_the_others_zeroed(family: str, calibration: CalibrationSet) -> None:
    """At all positions, in one pass and token by token from a cache."""
    model = sliced(model_of(family), calibration, sparsity=0.5, parts=("qk",), **UNIFORM)
    zeroed = model_of(family)
    view = ModelView.of(zeroed)
    plan = Plan.of_model(model)
    assert [(entry.kind, entry.kept, entry.units) for entry in plan.entries] == [("rotary_pair", 8, 16)] * 2
    with torch.no_grad():
        plan.zero(view.linears, [rotary_pairs(block) for block in view.blocks])
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-5)
    cache, steps = None, []
    with torch.no_grad():
        for token in TOKENS.T:
            out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, 0])
    torch.testing.assert_close(torch.stack(steps, dim=1), logits(zeroed), rtol=1e-4, atol=1e-5)
    assert cache.layers[0].keys.shape[-1] == 8


def test_kept_neurons_without_repair_are_the_mlp_with_the_others_zeroed(calibration: CalibrationSet) -> None:
    for family in ("llama", "phi3", "opt", "gpt2"):
        model = sliced(model_of(family), calibration, sparsity=0.5, parts=("mlp",), repair="none", **UNIFORM)
        zeroed = model_of(family)
        view = ModelView.of(zeroed)
        with torch.no_grad():
            Plan.of_model(model).zero(view.linears, [neurons(block) for block in view.blocks])
        torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MLP_ONLY)
def test_the_mlps_of_every_family_and_only_these(family: str, calibration: CalibrationSet, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=rf"attention of {family} models cannot be made narrower.*Set parts=mlp\."):
        sliced(model_of(family), calibration)
    model = sliced(model_of(family), calibration, parts=("mlp",))
    assert {entry["role"] for entry in record(model).changed} <= {"gate", "up", "gate_up", "down"}
    assert 0 < distance(model, model_of(family)) < 0.7
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


@pytest.mark.parametrize("score", ["ridge", "energy", "energy_down"])
def test_repair_lowers_the_error_of_every_down_projection(score: str, calibration: CalibrationSet) -> None:
    errors = {
        repair: [
            entry["relative_error"]
            for entry in record(
                sliced(model_of("llama"), calibration, score=score, repair=repair, parts=("mlp",), **UNIFORM)
            ).changed
            if entry["role"] == "down"
        ]
        for repair in ("none", "least_squares")
    }
    assert all(0 < a < b for a, b in zip(errors["least_squares"], errors["none"], strict=True))


def test_joint_values_lose_less_at_the_output(calibration: CalibrationSet) -> None:
    tails = {
        joint: [
            entry["relative_tail"]
            for entry in record(
                sliced(model_of("llama"), calibration, joint_values=joint, parts=("vo",), **UNIFORM)
            ).changed
            if entry["role"] == "o"
        ]
        for joint in (True, False)
    }
    assert all(a < 0.98 * b for a, b in zip(tails[True], tails[False], strict=True))


def test_without_groups_both_are_the_papers(calibration: CalibrationSet) -> None:
    single = {"num_key_value_heads": 4}
    first, second = (
        sliced(model_of("llama", **single), calibration, joint_values=joint, **UNIFORM) for joint in (True, False)
    )
    assert torch.equal(logits(first), logits(second))


def test_a_value_bias_becomes_the_bias_of_the_output(calibration: CalibrationSet) -> None:
    """Qwen2 has a bias of v and none of o. However large, what it adds is there whole."""
    for size in (0.0, 100.0):
        model = model_of("qwen2")
        with torch.no_grad():
            for block in ModelView.of(model).blocks:
                for linear in block.attention.linears:
                    if linear.role == "v":
                        linear.module.bias.fill_(size)
        block = ModelView.of(model).blocks[-1]
        o = next(linear for linear in block.linears if linear.role == "o")
        constant = o.weight @ torch.full((64,), size)
        made = sliced(model, calibration, parts=("vo",), targets=("*.1.*",), **UNIFORM)
        linears = {linear.role: linear for linear in ModelView.of(made).blocks[-1].linears}
        assert linears["v"].bias is None
        torch.testing.assert_close(linears["o"].bias, constant, rtol=1e-4, atol=1e-3)
        assert linears["o"].in_features == 48


def test_blocks_share_by_influence(calibration: CalibrationSet) -> None:
    options = {"sparsity": 0.45, "round_to": 1}
    model = sliced(model_of("llama", num_hidden_layers=4), calibration, temperature=0.1, **options)
    metrics = record(model).metrics
    influence, shares = metrics["block_influence"], metrics["block_sparsity"]
    assert list(influence) == list(shares) == [f"model.layers.{index}" for index in range(4)]
    assert sum(shares.values()) == pytest.approx(4 * 0.45)
    assert max(shares.values()) == pytest.approx(0.8)  # capped
    by_influence = sorted(shares, key=lambda name: influence[name])
    assert [shares[name] for name in by_influence] == sorted(shares.values(), reverse=True)
    assert shares == pytest.approx(softmax(influence, dict.fromkeys(shares, 1.0), 0.45, temperature=0.1, cap=0.8))
    for block in ModelView.of(model).blocks:
        width = next(linear.in_features for linear in block.linears if linear.role == "down")
        assert width == -(-round(112 * (1 - shares[block.name]) * 1e6) // 10**6)
    even = sliced(model_of("llama", num_hidden_layers=4), calibration, temperature=1e6, **options)
    assert list(record(even).metrics["block_sparsity"].values()) == pytest.approx([0.45] * 4, abs=1e-5)
    uniform = sliced(model_of("llama", num_hidden_layers=4), calibration, **{**options, **UNIFORM})
    assert torch.equal(logits(even), logits(uniform))


def test_widths_are_rounded_up_and_the_real_share_is_reported(calibration: CalibrationSet) -> None:
    model = sliced(model_of("llama"), calibration, sparsity=0.3, allocation="uniform", round_to=4)
    widths = {entry["role"]: (entry["kept_width"], entry["of_width"]) for entry in record(model).changed}
    assert widths["down"] == widths["gate"] == (80, 112)  # 78.4
    assert widths["v"] == widths["o"] == (12, 16)  # 11.2
    assert widths["q"] == widths["k"] == (6, 8)  # 5.6 pairs, a head of 12
    parts = {"down": 3 * 112 * 48, "v": 2 * (32 + 64) * 48 // 2, "q": 2 * (32 + 64) * 48 // 2}
    gone = sum(size * (1 - widths[role][0] / widths[role][1]) for role, size in parts.items())
    assert record(model).metrics["removed_of_targets"] == pytest.approx(gone / sum(parts.values()))


def test_one_unit_of_each_kind_is_always_left(calibration: CalibrationSet) -> None:
    model = sliced(model_of("llama"), calibration, sparsity=0.999, **UNIFORM)
    widths = {entry["role"]: entry["kept_width"] for entry in record(model).changed}
    assert set(widths.values()) == {1}
    assert bool(torch.isfinite(logits(model)).all())


def test_normalised_queries_and_keys_keep_their_pairs_and_the_record_says_so(calibration: CalibrationSet) -> None:
    model = sliced(model_of("qwen3"), calibration)
    assert {entry["role"] for entry in record(model).changed} == {"v", "o", "gate", "up", "down"}
    reasons = {entry["module"]: entry["reason"] for entry in record(model).unchanged}
    for name in ("q_proj", "k_proj"):
        assert reasons[f"model.layers.0.self_attn.{name}"] == "queries and keys are normalised by head"
    with pytest.raises(TargetError, match=r"layers\.0: queries and keys are normalised.*parts=mlp,vo"):
        sliced(model_of("qwen3"), calibration, parts=("mlp", "qk"))


def test_export_uniform_is_an_ordinary_smaller_model(calibration: CalibrationSet, tmp_path: Path) -> None:
    model = sliced(model_of("llama"), calibration, export="uniform")
    assert model.config.intermediate_size == 80
    tt.save(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert getattr(stock.config, "quantization_config", None) is None
    assert torch.equal(logits(stock), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("mlp", "vo")}, r"it wants parts=mlp, not \('mlp', 'vo'\)"),
        ({"allocation": "softmax"}, "it wants allocation=uniform, not softmax"),
    ],
)
def test_options_that_contradict_the_export_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoDeGpt(export="uniform", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "sparsity=0.0 must be above 0 and below 1"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be above 0 and below 1"),
        ({"sparsity": -0.2}, "sparsity=-0.2"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": 0.9}, "sparsity=0.9 is above cap=0.8.*allocation=uniform"),
        ({"cap": 1.0}, "cap=1.0 must be"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"ridge": -1.0}, "ridge=-1.0 must be positive"),
        ({"round_to": 0}, "round_to=0 must be at least 1"),
        ({"parts": ()}, "parts=.* must name some of mlp, qk, vo"),
        ({"parts": ("mlp", "mlp")}, "each once"),
        ({"parts": ("heads",)}, "parts"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoDeGpt(**options)


def test_options_from_the_command_line() -> None:
    made = MoDeGpt.from_options(
        {"parts": "mlp,vo", "sparsity": "0.2", "joint_values": "false", "allocation": "uniform"}
    )
    assert made == MoDeGpt(parts=("mlp", "vo"), sparsity=0.2, joint_values=False, allocation="uniform")
    assert MoDeGpt.from_options({"parts": "mlp"}) == MoDeGpt(parts=("mlp",))


def test_nothing_to_remove_is_refused_before_any_work(calibration: CalibrationSet) -> None:
    for options in ({"allocation": "uniform"}, {"parts": ("vo",), "round_to": 16}):
        model = model_of("llama")
        with pytest.raises(TargetError, match=r"sparsity=0\.01 with round_to=.* removes nothing"):
            sliced(model, calibration, sparsity=0.01, **{"round_to": 64, **options})
        assert torch.equal(logits(model), logits(model_of("llama")))


def test_the_record_says_why_linears_stay_whole(calibration: CalibrationSet) -> None:
    model = sliced(
        model_of("llama"),
        calibration,
        sparsity=0.3,
        allocation="uniform",
        parts=("mlp", "qk"),
        targets=("*.0.*",),
        round_to=16,
    )
    reasons = {entry["module"]: entry["reason"] for entry in record(model).unchanged}
    assert reasons["model.layers.0.self_attn.v_proj"] == "it is in none of the parts mlp, qk"
    assert reasons["model.layers.0.self_attn.q_proj"] == "a share of 0.3 of 8 rounds to nothing with round_to=16"
    assert reasons["model.layers.1.mlp.up_proj"] == "no pattern in `targets` matches it"
    assert "model.layers.0.mlp.up_proj" not in reasons


@pytest.mark.parametrize("score", ["ridge", "energy", "energy_down"])
def test_neurons_that_never_fire_go_first(score: str, calibration: CalibrationSet) -> None:
    model = model_of("llama")
    with torch.no_grad():
        for block in ModelView.of(model).blocks:
            for linear in block.mlp.linears:
                if linear.role == "gate":
                    linear.module.weight[1::2] = 0
                    linear.module.bias[1::2] = 0
    plan = Plan.of_model(sliced(model, calibration, sparsity=0.5, score=score, parts=("mlp",), **UNIFORM))
    assert all(torch.equal(entry.keep, torch.arange(112) % 2 == 0) for entry in plan.entries)


def test_energy_at_the_output_leaves_out_neurons_that_nothing_reads(calibration: CalibrationSet) -> None:
    model = model_of("llama")
    with torch.no_grad():
        for block in ModelView.of(model).blocks:
            for linear in block.mlp.linears:
                if linear.role == "down":
                    linear.module.weight[:, 1::2] = 0
    method = {"sparsity": 0.5, "score": "energy_down", "parts": ("mlp",), **UNIFORM}
    plan = Plan.of_model(sliced(model, calibration, **method))
    assert all(torch.equal(entry.keep, torch.arange(112) % 2 == 0) for entry in plan.entries)


def test_pairs_are_those_with_the_largest_energy_of_what_is_computed(calibration: CalibrationSet) -> None:
    """With biases, which inputs that are not centred add to or take from."""
    model = model_of("llama")
    attention = model.get_submodule("model.layers.0.self_attn")
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            linear = attention.get_submodule(name)
            linear.bias.mul_(20)
            linear.register_forward_hook(lambda module, args, out, name=name: found.__setitem__(name, out))
        model(input_ids=calibration.tokens)
    energies = {name: out.double().square().mean((0, 1)).view(2, -1, 2, 8).sum((1, 2)) for name, out in found.items()}
    scores = energies["q_proj"] * energies["k_proj"]
    kept = scores.topk(4, dim=1)
    made = sliced(model, calibration, sparsity=0.5, parts=("qk",), targets=("*.0.*",), **UNIFORM)
    assert Plan.of_model(made).entries[0].keep.view(2, 8).nonzero()[:, 1].view(2, 4).tolist() == (
        kept.indices.sort(dim=1).values.tolist()
    )
    for entry in record(made).changed:
        assert entry["kept_energy"] == pytest.approx(float(kept.values.sum() / scores.sum()), rel=1e-4)


def test_pairs_without_energy_go_first_in_each_head(calibration: CalibrationSet) -> None:
    """Of KV head 0 the odd pairs of the keys are silent, of head 1 the even pairs of all its queries."""
    model = model_of("llama")
    silent = torch.zeros(8, dtype=torch.bool)
    silent[1::2] = True
    with torch.no_grad():
        for block in ModelView.of(model).blocks:
            for linear in block.attention.linears:
                rows = torch.zeros(linear.out_features // 16, 16, dtype=torch.bool)
                if linear.role == "k":
                    rows[0] = silent.repeat(2)
                elif linear.role == "q":
                    rows[2:] = ~silent.repeat(2)
                else:
                    continue
                linear.module.weight[rows.reshape(-1)] = 0
                linear.module.bias[rows.reshape(-1)] = 0
    plan = Plan.of_model(sliced(model, calibration, sparsity=0.5, parts=("qk",), **UNIFORM))
    assert all(torch.equal(entry.keep.view(2, 8), torch.stack([~silent, silent])) for entry in plan.entries)


def test_targets_name_whole_modules(calibration: CalibrationSet) -> None:
    with pytest.raises(TargetError, match=r"widths of 'mlp' run through .* targets leaves out .*up_proj"):
        sliced(model_of("llama"), calibration, targets=("gate_proj", "down_proj"))
    with pytest.raises(TargetError, match=r"targets=o_proj.* names nothing of parts=mlp,qk|leaves out .*v_proj"):
        sliced(model_of("llama"), calibration, targets=("o_proj",))
    with pytest.raises(TargetError, match="names nothing of parts=mlp"):
        sliced(model_of("llama"), calibration, targets=("q_proj", "k_proj"), parts=("mlp",))
    model = sliced(model_of("llama"), calibration, targets=("*.1.mlp.*",), **UNIFORM)
    assert {entry["linear"] for entry in record(model).changed} == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_fewer_tokens_than_neurons_and_directions(calibration: CalibrationSet) -> None:
    few = CalibrationSet.from_tokens(calibration.tokens[:1, :6])
    model = sliced(model_of("llama"), few, sparsity=0.1, parts=("vo",), **UNIFORM)
    for linear in ModelView.of(model).linears:
        if linear.role == "v":  # all 15 directions are used, although six tokens reach six of them
            assert int(torch.linalg.matrix_rank(linear.weight[:15])) == 15
    for score in ("ridge", "energy", "energy_down"):
        assert bool(torch.isfinite(logits(sliced(model_of("llama"), few, score=score, **UNIFORM))).all())


def test_a_model_can_be_narrowed_again(calibration: CalibrationSet, tmp_path: Path) -> None:
    model = sliced(model_of("llama"), calibration, sparsity=0.25, **UNIFORM)
    once = Plan.of_model(model).entries[1].keep
    model = sliced(model, calibration, sparsity=0.5, **UNIFORM)
    shapes = {linear.role: linear.out_features for linear in ModelView.of(model).blocks[0].linears}
    assert shapes == {"q": 24, "k": 12, "v": 12, "o": 48, "gate": 42, "up": 42, "down": 48}
    assert int(once.sum()) == 12
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_other_dtypes(calibration: CalibrationSet) -> None:
    model = sliced(model_of("qwen2", dtype=torch.bfloat16), calibration)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


def test_a_run_that_was_killed_ends_with_the_same_weights(calibration: CalibrationSet, tmp_path: Path) -> None:
    def run() -> PreTrainedModel:
        method = MoDeGpt(sparsity=0.4, temperature=1.0, round_to=1)
        return tt.compress(
            model_of("qwen2"), method, calibration=calibration, state_dir=tmp_path / "state", progress=False
        )

    whole = run().state_dict()
    for path in (tmp_path / "state" / "block-0001").iterdir():
        path.unlink()
    (tmp_path / "state" / "block-0001").rmdir()
    again = run()
    assert record(again).metrics["resumed_blocks"] == 1
    assert all(torch.equal(whole[name], value) for name, value in again.state_dict().items())
