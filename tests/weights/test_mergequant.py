"""MergeQuant: migration and splitting are exact, inputs are static, each remedy lowers the error it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError
from trimtab.evaluation.outliers import inject_outliers
from trimtab.kernels.int_matmul import int_matmul
from trimtab.models.calibration import BlockStream
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.folding import NormFold
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.tensors import compressed as tensors_compressed
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.metric import Metric
from trimtab.tensors.transform import Chain
from trimtab.weights import _step_migration as migration
from trimtab.weights._step_migration import Copies
from trimtab.weights.mergequant import Mergequant
from trimtab.weights.rtn import Rtn

NAIVE: dict[str, Any] = {"split": False, "adaptive_clip": False, "rank": 0, "gptq": False, "rotate": False}
Break = Callable[[pytest.MonkeyPatch], None]


def compress(model: PreTrainedModel, method: Any, calibration: CalibrationSet, **settings: Any) -> PreTrainedModel:
    return tt.compress(model, method, calibration=calibration, progress=False, **settings)


def toy() -> tuple[Tensor, Tensor]:
    """Inputs [512, 256] with five channels 10 to 40 times the others, weights [192, 256]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator)
    x[:, [17, 80, 111, 200, 230]] *= torch.linspace(10, 40, 5)
    return x, torch.randn(192, 256, generator=generator) / 16


def joint_error(**options: Any) -> float:
    x, weight = toy()
    found = Mergequant(**{**NAIVE, **options}).static_input(x, weight, x.abs().amax(0))
    return float(found.notes["joint_error"])


# 1. Migration without rounding


FAMILIES = ("llama", "gemma3", "phi3", "opt", "gpt2", "gpt_neox")


def beside_rtn(family: str, calibration: CalibrationSet) -> float:
    """Change of the logits with 8-bit weights and inputs, as a multiple of what plain rounding to them changes."""
    changes = []
    for method in (
        Mergequant(bits=8, activation_bits=8),
        Rtn(bits=8, group_size=-1, symmetric=True, activation_bits=8),
    ):
        model = random_model(family)
        if family not in ("opt", "gpt2", "gpt_neox"):
            inject_outliers(model, channels=4)
        with torch.no_grad():
            before = model(input_ids=calibration.tokens).logits  # text whose steps are known: nothing saturates
            compress(model, method, calibration)
            changes.append(float((model(input_ids=calibration.tokens).logits - before).norm()))
    return changes[0] / changes[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_and_their_inverses_meet_in_every_family(family: str, calibration: CalibrationSet) -> None:
    assert beside_rtn(family, calibration) < 1.5


def without_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormFold, "divided", lambda self, scale: {})


def without_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NormFold.divided
    monkeypatch.setattr(
        NormFold, "divided", lambda self, scale: right(NormFold(self.consumers, self.norm, self.name, 0.0), scale)
    )


def with_copies_at_full_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "widen", lambda self, weight: weight[:, self.index.long()])


@pytest.mark.parametrize("broken", [without_the_norms, without_the_offset])
def test_the_check_notices_a_broken_variant(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch, broken: Break
) -> None:
    broken(monkeypatch)
    assert beside_rtn("gemma3", calibration) > 1.5


# 2. Splitting


@given(seed=st.integers(0, 1000), alpha=st.floats(0.1, 5), extra=st.integers(0, 40))
def test_splitting_is_exact(seed: int, alpha: float, extra: int) -> None:
    """Copies are the same whole numbers, and what they do together is what the channel did."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(24, generator=generator).exp() ** 4
    copies = migration.split(strength, migration.threshold_of(strength, alpha))
    assert bool((strength / copies.count <= migration.threshold_of(strength, alpha) * (1 + 1e-6)).all())
    copies = migration.fill(copies, strength, int(copies.count.sum()) + extra)
    x = torch.randn(10, 24, generator=generator) * 5
    weight = torch.randn(6, 24, generator=generator)
    static = ActivationGrid(24, 4, "static", index=copies.index)
    assert torch.equal(static.apply(x), migration.integers(x, torch.ones(24), 7)[:, copies.index.long()])
    wide = copies.widen(weight)
    assert wide.shape[1] == int(copies.count.sum())
    torch.testing.assert_close(copies.fold(wide), weight)
    torch.testing.assert_close(static.fold(wide), weight)
    torch.testing.assert_close(
        static.apply(x).double() @ wide.double().T,
        x.round().clamp(-7, 7).double() @ weight.double().T,
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_spare_room_goes_to_the_strongest() -> None:
    copies = migration.fill(Copies(torch.tensor([1, 1, 1])), torch.tensor([12.0, 5.0, 1.0]), 6)
    assert copies.count.tolist() == [3, 2, 1]
    assert copies.index.tolist() == [0, 0, 0, 1, 1, 2]


# 3. Static inputs


class Reductions(TorchDispatchMode):
    """Names of all operations that look for a largest or smallest of numbers that are no indices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = any(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        if floats and any(
            word in str(func) for word in ("amax", "amin", "max.", "min.", "aminmax", "norm", "topk", "sort")
        ):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def static_layers_are_static(model: PreTrainedModel) -> bool:
    generator = torch.Generator().manual_seed(1)
    for linear in ModelView.of(model).linears:
        module = linear.compressed
        assert module is not None
        x = torch.randn(5, linear.in_features, generator=generator)
        with Reductions() as found:
            together = module(x)
        static = linear.role in ("q", "k", "v", "gate", "up")
        if not static:
            assert found.seen
            continue
        if found.seen or not torch.allclose(together, torch.cat([module(row[None]) for row in x]), rtol=1e-5):
            return False
        if not torch.allclose(module(1e6 * x), module(1e7 * x), rtol=1e-5):
            return False  # saturated: the step does not follow the input
    return True


def test_linears_behind_norms_measure_nothing_at_run_time(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    model = compress(random_model("llama"), Mergequant(), calibration)
    assert static_layers_are_static(model)
    kinds = {entry["role"]: entry["activations"] for entry in model.trimtab.record.changed}
    assert {role for role, kind in kinds.items() if kind == "static"} == {"q", "k", "v", "gate", "up"}
    assert kinds["o"] == "per token: 4 query heads share 2 value heads"
    assert kinds["down"] == "per token: a linear makes it, no norm"
    layer = ModelView.of(model).blocks[0].linears[0].compressed
    assert layer is not None
    grid, static = layer.tensor.parts[0], layer.tensor.transform
    assert isinstance(static, ActivationGrid)
    dynamic = ActivationGrid(static.size, static.bits, "token", index=static.index)
    layer_is = CompressedLinear(CompressedTensor((grid,), dynamic))
    ModelView.of(model).blocks[0].linears[0].replace(layer_is)
    assert not static_layers_are_static(model)  # the check can fail


# 4. The order of errors on outlier data


def each_remedy_helps() -> bool:
    naive, clipped = joint_error(), joint_error(adaptive_clip=True)
    split, both = joint_error(split=True), joint_error(split=True, adaptive_clip=True)
    return both < split < 0.5 * clipped and clipped < 0.95 * naive


def test_each_remedy_lowers_the_error() -> None:
    """naive > clipped > split > split and clipped; and naive is no better than rounding per token."""
    assert each_remedy_helps()
    x, weight = toy()
    fmt = GridFormat(bits=4, group_size=-1, symmetric=True)
    wanted = x @ weight.T
    per_token = ActivationGrid(256, 4, "token").apply(x) @ GroupGrid.quantize(weight, fmt).dequantize().T
    error = float((per_token - wanted).square().sum() / wanted.square().sum())
    assert joint_error() > 0.9 * error > 2 * joint_error(split=True)


def with_strong_channels_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        migration, "split", lambda strength, threshold: Copies((strength / threshold < 1).long().clamp(min=1))
    )
    monkeypatch.setattr(migration, "fill", lambda copies, strength, width: copies)


def without_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "descend", lambda objective, groups, ratios, size, patience: torch.ones(size))


@pytest.mark.parametrize("broken", [with_strong_channels_kept_whole, without_ratios, with_copies_at_full_weight])
def test_the_order_notices_a_broken_variant(monkeypatch: pytest.MonkeyPatch, broken: Break) -> None:
    broken(monkeypatch)
    assert not each_remedy_helps()


def test_an_unreachable_threshold_is_no_split() -> None:
    x, weight = toy()
    largest = x.abs().amax(0)
    far = Mergequant(**{**NAIVE, "split": True, "alphas": (1e6,)}).static_input(x, weight, largest)
    assert far.notes["joint_error"] == joint_error()
    assert bool((far.copies.count == 1).all())
    assert far.notes["alpha"] == "none"


def test_the_width_is_bounded_and_padded() -> None:
    x, weight = toy()
    for options, width in (({}, 320), ({"max_widening": 0.0}, 256), ({"multiple": 8, "alphas": (1.0,)}, 280)):
        found = Mergequant(adaptive_clip=False, **options).static_input(x, weight, x.abs().amax(0))
        assert found.notes["width"] == width
    kept = Mergequant(keep_width=True).static_input(x, weight, x.abs().amax(0))
    assert kept.notes["width"] == 256
    assert int(kept.copies.count.min()) == 0


# 5. Steps of one text on another


def saturated_share(calibration_share: float) -> float:
    """Largest share over the sites of ref-mini's first block of held-out inputs beyond their channel's step."""
    model = tt.load("ref-mini", dtype=torch.float32)
    view = ModelView.of(model)
    texts = [CalibrationSet.from_text(None, model.trimtab.tokenizer, sequences=16, length=128, seed=s) for s in (0, 1)]
    a, b = (
        BlockStream(view, text).gather(
            view.blocks[0], {"layers.0.attention_in": {"abs_max"}, "layers.0.mlp_in": {"abs_max", "reservoir"}}
        )
        for text in texts
    )
    known, new = a["layers.0.mlp_in"].abs_max, b["layers.0.mlp_in"].reservoir
    assert known is not None
    assert new is not None
    return migration.saturation(new, migration.steps_for(known * calibration_share, 7), 7)


def test_steps_hold_on_other_text_of_the_kind() -> None:
    assert saturated_share(1.0) < 1e-3
    assert saturated_share(0.4) > 1e-3  # the check can fail


# 6. Whole numbers


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_number_products_are_the_float_ones(calibration: CalibrationSet, bits: Any, rotate: bool) -> None:
    """W_int X_int in int32, then the scale of the row, is what the layer computes; so are rounded floats."""
    model = compress(random_model("llama"), Mergequant(bits=bits, activation_bits=bits, rotate=rotate), calibration)
    for linear in ModelView.of(model).blocks[0].linears:
        layer = linear.compressed
        assert layer is not None
        (grid,), transform = layer.tensor.parts, layer.tensor.transform
        assert isinstance(grid, GroupGrid)
        assert transform is not None
        x = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(1)) * 4
        torch.testing.assert_close(layer(x), grid.matmul(transform.apply(x)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(layer(x), x @ layer.dequantize().T, rtol=1e-3)
        given = x
        if isinstance(transform, Chain):
            x, transform = transform.steps[0].apply(x), transform.steps[1]
        assert isinstance(transform, ActivationGrid)
        codes, step, _ = transform.integers(x)
        whole = codes.int() @ (grid.codes().int() - grid.format.levels // 2).T
        expected = whole.float() * grid.scales.float()[:, 0] * (1.0 if step is None else step)
        torch.testing.assert_close(layer(given), expected, rtol=1e-6, atol=1e-6)


def test_layers_multiply_whole_numbers(calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them go through the kernel for it, with the step 1 where inputs are static."""
    seen: list[float | None] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["x_scale"])
        return int_matmul(*args, **kwargs)

    model = compress(random_model("llama"), Mergequant(rotate=True), calibration)
    monkeypatch.setattr(tensors_compressed, "int_matmul", watched)
    with torch.no_grad():
        model(input_ids=calibration.tokens)
    assert seen == 2 * [1.0, 1.0, 1.0, None, 1.0, 1.0, None]


# Compensation and removal


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, W', X and x of a toy whose inputs were rounded coarsely."""
    x, weight = toy()
    steps = migration.steps_for(x.abs().amax(0), 3)
    return weight, weight * steps, migration.integers(x, steps, 3), x


def test_compensation_lowers_the_error_with_its_rank() -> None:
    weight, migrated, whole, x = regression()
    gram, cross = whole.T @ whole / len(x), whole.T @ x / len(x)
    residual = weight @ cross.T - migrated @ gram

    def error(change: Tensor) -> float:
        return float((whole @ (migrated + change).T - x @ weight.T).square().sum())

    errors = [error(migration.compensation(migrated, gram, residual, rank, 1e-6)) for rank in (0, 4, 16, 64, 192)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.98 * errors[0] == pytest.approx(0.98 * error(torch.zeros_like(migrated)))
    best = torch.linalg.lstsq(whole.double(), (x @ weight.T).double()).solution.T.float()
    assert errors[-1] == pytest.approx(error(best - migrated), rel=0.01)
    change = migration.compensation(migrated, gram, residual, 4, 1e-6)
    assert int(torch.linalg.matrix_rank(change)) == 4
    assert error(-change) > errors[0]  # a wrong sign would show


def test_the_channel_that_is_removed_is_the_one_least_missed() -> None:
    """Against every removal followed by the best refit of the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    gram = x.T @ x / len(x)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    copies = Copies(torch.tensor([2, *[1] * 11]))
    metric = Metric.gram(damped)

    def refitted(j: int) -> float:
        kept = [i for i in range(12) if i != j]
        best = torch.zeros_like(weight)
        best[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        return metric.squared_norm(best - weight)

    found, left = migration.remove(weight, gram, copies, 1, 0.01)
    assert metric.squared_norm(found - weight) == pytest.approx(min(refitted(j) for j in range(1, 12)), rel=1e-3)
    assert left.count.tolist().count(0) == 1
    assert left.count[0] == 2
    several, left = migration.remove(weight, gram, copies, 4, 0.01)
    assert left.count.tolist().count(0) == 4
    assert bool((several[:, left.count == 0] == 0).all())
    plain = weight * (left.count > 0)
    assert metric.squared_norm(several - weight) < 0.8 * metric.squared_norm(plain - weight)


# In a model


def test_a_norm_with_other_readers_is_left_alone_and_named(calibration: CalibrationSet) -> None:
    model = compress(random_model("llama"), Mergequant(targets=("q_proj",)), calibration)
    assert model.trimtab.record.changed_dense == []
    assert model.trimtab.record.changed[0]["activations"] == (
        "per token: model.layers.0.input_layernorm is also read by model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, which must stay as it is"
    )


def test_inputs_without_a_norm_can_be_rotated(calibration: CalibrationSet) -> None:
    model = compress(random_model("llama"), Mergequant(bits=8, activation_bits=8, rotate=True), calibration)
    layers = {linear.role: linear.compressed for linear in ModelView.of(model).blocks[0].linears}
    kinds = {role: type(layer.tensor.transform) for role, layer in layers.items() if layer is not None}
    assert kinds == {r: Chain if r in ("o", "down") else ActivationGrid for r in kinds}
    original = random_model("llama").model.layers[0].mlp.down_proj.weight
    down = layers["down"]
    assert down is not None
    torch.testing.assert_close(down.dequantize(), original, atol=0.02, rtol=0)


def test_the_first_position_can_be_left_out(calibration: CalibrationSet) -> None:
    """It is, if the first token of every sequence is one that puts out more than the others."""
    first = torch.full((len(calibration.tokens), 1), 2)
    text = CalibrationSet.from_tokens(torch.cat([first, calibration.tokens], 1), source="with a first token")
    gains = []
    for skip in (False, True):
        model = random_model("llama")
        model.model.embed_tokens.weight.data[2] = 0
        model.model.embed_tokens.weight.data[2, 7] = 1.0  # all of it in one channel, which the norm makes sqrt(48)
        compress(model, Mergequant(**NAIVE, skip_first=skip), text)
        gains.append(float(model.model.layers[0].input_layernorm.weight[7].detach().abs()))
    assert gains[1] > 1.5 * gains[0]


def test_a_finished_run_is_taken_up_with_its_norms(calibration: CalibrationSet, tmp_path: Path) -> None:
    first = compress(random_model("llama"), Mergequant(), calibration, state_dir=tmp_path)
    second = compress(random_model("llama"), Mergequant(), calibration, state_dir=tmp_path)
    assert second.trimtab.record.metrics["resumed_blocks"] == 2
    assert second.trimtab.record.changed_dense == first.trimtab.record.changed_dense
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_dead_channels_keep_the_norm_finite() -> None:
    x, weight = toy()
    x[:, 3] = 0
    steps = migration.steps_for(x.abs().amax(0), 7)
    assert float(steps[3]) == pytest.approx(1e-5 * float(steps.median()))
    assert bool((migration.steps_for(torch.zeros(4), 7) == 1).all())
    found = Mergequant().static_input(x, weight, x.abs().amax(0))
    assert bool(torch.isfinite(found.weight).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": ()}, r"alphas=\(\) must be positive, at least one"),
        ({"alphas": (0.5, 0.0)}, "alphas=.* must be positive"),
        ({"max_widening": 1.5}, r"max_widening=1.5 must be in 0 .. 1"),
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"sequences": 0}, "sequences=0 must be at least 1"),
        ({"multiple": 0}, "multiple=0 must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mergequant(**options)
