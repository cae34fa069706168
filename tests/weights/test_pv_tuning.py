"""PV-Tuning: what the V step owes on a quadratic, in one step, and over a run; also to broken variants."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.core.errors import ConfigError, DataError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import random_model
from trimtab.tensors import Codebook, CompressedTensor, GridFormat, GroupGrid, LevelTable, Part, TableFormat
from trimtab.weights import _pv_step
from trimtab.weights._distillation import Distillation
from trimtab.weights._pv_step import CodeRules, CodeStepper, Direction, choose_codes
from trimtab.weights._student import Layer, Student
from trimtab.weights.pv_tuning import PvTuning

WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
ALL = CodeRules()


def codebook(weight: Tensor, width: int, size: int) -> Codebook:
    points = weight.reshape(-1, width)
    table = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:size]]
    codes = torch.zeros(weight.shape[0], weight.shape[1] // width, 1, dtype=torch.uint8)
    return Codebook(codes, table[None].half(), torch.ones(weight.shape[0]).half()).project(weight)


PARTS: dict[str, Callable[[], Part]] = {
    "grid": lambda: GroupGrid.quantize(WEIGHT, GridFormat(bits=2, group_size=16, symmetric=False)),
    "table": lambda: LevelTable.quantize(WEIGHT, TableFormat(bits=2, group_size=16)),
    "codebook": lambda: codebook(WEIGHT, 4, 16),
}
every_part = pytest.mark.parametrize("part", [make() for make in PARTS.values()], ids=list(PARTS))


# (1) a quadratic with few values: phi(x) = |A (x - t)|^2 / 2, x of 256 coordinates on a codebook of 4 numbers


class Quadratic:
    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(1, 256, generator=generator)
        root = torch.randn(256, 64, generator=generator) / 8  # correlated: what one coordinate loses others can mend
        self.hessian = root @ root.T + 0.05 * torch.eye(256)
        self.generator = generator
        self.part = codebook(self.target, 1, 4)
        self.fit_values()

    def loss(self) -> float:
        error = self.part.dequantize() - self.target
        return float((error @ self.hessian * error).sum() / 2)

    def gradient(self) -> Tensor:
        return (self.part.dequantize() - self.target) @ self.hessian

    def fit_values(self) -> None:
        """The P step, exactly: the best values for the present codes."""
        choice = torch.nn.functional.one_hot(self.part.codes[0, :, 0].long(), 4).float()
        left, right = choice.T @ self.hessian @ choice, choice.T @ self.hessian @ self.target[0]
        values = torch.linalg.lstsq(left, right[:, None]).solution
        self.part = self.part.with_continuous({"codebooks": values[None], "scales": torch.ones(1)})

    def smoothness(self, chosen: Tensor) -> float:
        """L_S: the largest eigenvalue of the Hessian on these coordinates."""
        return float(torch.linalg.eigvalsh(self.hessian[chosen][:, chosen])[-1])

    def step(self, count: int, stretch: float = 1.0) -> int:
        """The linearised V step of length 1 / L_S on `count` coordinates, drawn by the size of their gradients."""
        gradient = self.gradient()
        chosen = torch.multinomial(gradient[0].abs(), count, generator=self.generator)
        target = self.part.dequantize()
        target[0, chosen] -= stretch * gradient[0, chosen] / self.smoothness(chosen)
        self.part, changed = choose_codes(self.part, target, CodeRules(share=count / 256))
        return changed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_whole_gradient_step_changes_no_code_and_steps_on_a_subspace_leave_that_fixed_point(seed: int) -> None:
    """Alternating exact P steps with V: of all coordinates (naive), then of two at a time."""
    problem = Quadratic(seed)
    for _ in range(20):
        assert problem.step(256) == 0
        problem.fit_values()
    fixed = problem.loss()
    losses, changed = [fixed], 0
    for _ in range(300):
        changed += problem.step(2)
        losses.append(problem.loss())
        problem.fit_values()
        losses.append(problem.loss())
    assert all(after <= before + 1e-3 * fixed for before, after in pairwise(losses))  # values are stored in float16
    assert changed > 20
    assert losses[-1] < 0.7 * fixed


def test_the_quadratic_notices_steps_that_are_longer_than_their_subspace_allows() -> None:
    """The length of two coordinates, taken along all of them: codes change, and the loss rises."""
    problem = Quadratic(0)
    before = problem.loss()
    assert problem.step(256, stretch=6.0) > 0
    assert problem.loss() > 1.02 * before


# (2) the format does not change, and codes are those of the weight


def different_values(part: Part) -> int:
    return len(part.dequantize().unique())


@every_part
def test_bytes_and_values_stay_and_codes_are_those_of_the_weight(part: Part) -> None:
    target = part.dequantize() + 0.5 * torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    found, changed = choose_codes(part, target, CodeRules(share=0.3))
    assert changed > 0
    assert found.spec() == part.spec()
    assert found.nbytes == part.nbytes
    for name, value in part.continuous().items():
        assert torch.equal(found.continuous()[name], value)
    assert torch.equal(found.project(found.dequantize()).dequantize(), found.dequantize())


# (3) how much one step may change


@every_part
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("force", [False, True])
def test_no_more_groups_change_than_the_share(part: Part, share: float, force: bool) -> None:
    target = part.dequantize() + torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    found, changed = choose_codes(part, target, CodeRules(share=share, force=force))
    shape = part.code_shape
    assert shape is not None
    moved = (found.dequantize() - part.dequantize()).view(*shape, -1).abs().sum(-1) > 0
    assert int(moved.sum()) == changed <= math.ceil(share * moved.numel())
    if force:
        assert changed == math.ceil(share * moved.numel())


@every_part
@pytest.mark.parametrize("trust", [0.02, 0.1, 0.3])
def test_changes_together_are_within_the_trust_region_but_for_one_group(part: Part, trust: float) -> None:
    target = part.dequantize() + torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    free, _ = choose_codes(part, target, CodeRules(share=0.5))
    found, changed = choose_codes(part, target, CodeRules(share=0.5, trust=trust))
    weight = part.dequantize()
    length = float((found.dequantize() - weight).norm())
    assert changed >= 1
    assert length <= trust * float(weight.norm()) or changed == 1
    assert float((free.dequantize() - weight).norm()) > trust * float(weight.norm())
    # the longest steps first
    shape = part.code_shape
    assert shape is not None
    distance = (target - weight).square().view(*shape, -1).sum(-1)
    moved = (found.dequantize() - weight).view(*shape, -1).abs().sum(-1) > 0
    skipped = ((free.dequantize() - weight).view(*shape, -1).abs().sum(-1) > 0) & ~moved
    if bool(skipped.any()):
        assert float(distance[moved].min()) >= float(distance[skipped].max()) - 1e-6


def test_the_trust_region_is_needed() -> None:
    """A broken variant: without it the same step changes far more."""
    part = PARTS["grid"]()
    target = part.dequantize() + torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    found, _ = choose_codes(part, target, CodeRules(share=0.5, trust=math.inf))
    assert float((found.dequantize() - part.dequantize()).norm()) > 0.3 * float(part.dequantize().norm())


# the steps of one layer


def layer_of(part: Part, gradient: Tensor) -> Layer:
    from trimtab.models.compressed_linear import CompressedLinear

    layer = Layer("layer", CompressedLinear(CompressedTensor((part,))), torch.float32)
    layer.dense.weight.grad = gradient
    return layer


@pytest.mark.parametrize(("decay", "accumulates"), [(0.0, True), (1.0, False)])
def test_what_codes_cannot_express_adds_up_only_without_decay(decay: float, accumulates: bool) -> None:
    gradient = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    layer = layer_of(PARTS["grid"](), gradient)
    stepper = CodeStepper(layer, CodeRules(decay=decay))
    changed = [stepper.step(0.05) for _ in range(40)]
    assert changed[0] == 0
    assert (sum(changed) > 0) == accumulates
    if not accumulates:
        assert torch.equal(stepper.buffer, layer.weight())


def test_a_step_of_codes_is_as_long_as_its_rate_says_and_has_no_momentum() -> None:
    gradient = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    direction = Direction(0.0, 0.95)
    first = direction.step(gradient, torch.tensor(3.0))
    assert float(first.norm()) == pytest.approx(3.0, rel=1e-5)
    assert torch.allclose(first.sign(), gradient.sign())
    second = direction.step(-gradient, torch.tensor(3.0))
    assert torch.allclose(second.sign(), -gradient.sign())
    momentum = Direction(0.9, 0.95)
    momentum.step(gradient, torch.tensor(3.0))
    assert not torch.allclose(momentum.step(-0.5 * gradient, torch.tensor(3.0)).sign(), -gradient.sign())
    assert bool((Direction(0.9, 0.95).step(torch.zeros(3), torch.tensor(1.0)) == 0).all())


def test_distances_are_to_the_weight_of_the_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A P step that halves all scales must not itself look like a wish to change codes."""
    part = PARTS["grid"]()
    layer = layer_of(part, torch.zeros(16, 64))
    stepper = CodeStepper(layer, ALL)
    with torch.no_grad():
        layer.numbers[0]["scales"] *= 0.5
    seen: list[Tensor] = []
    right = _pv_step.choose_codes
    monkeypatch.setattr(
        _pv_step, "choose_codes", lambda p, t, r: seen.append(p.dequantize()) or right(p, t, r)
    )  # fmt: skip
    stepper.step(0.0)
    torch.testing.assert_close(seen[0], 0.5 * part.dequantize(), rtol=1e-3, atol=1e-4)


# a run


def text(model_words: int = 131, sequences: int = 64) -> CalibrationSet:
    tokens = torch.randint(3, model_words, (sequences, 24), generator=torch.Generator().manual_seed(7))
    return CalibrationSet.from_tokens(tokens, source="random tokens")


def tuned(**options: Any) -> Any:
    settings = {"bits": 2, "base": "rtn", "base_options": ("group_size=16",), "steps": 12, "check_every": 2, **options}
    settings = {"batch_tokens": 96, "lr": 3e-3, "code_lr": 0.1, "max_code_change": 0.01, "trust_ratio": 0.1, **settings}
    model = random_model("llama")
    return tt.compress(model, PvTuning(**settings), calibration=text(), progress=False)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("base", ["rtn", "nf", "vq"])
@pytest.mark.parametrize("mode", ["pv_ste", "subspace", "ste", "continuous"])
def test_tuning_lowers_the_loss_in_the_same_bytes_and_reports_what_is_kept(base: str, mode: str) -> None:
    options = ("iterations=3", "steps=3") if base == "vq" else ("group_size=16",)
    model = tuned(base=base, base_options=options, mode=mode)
    plain = tt.compress(
        random_model("llama"),
        PvTuning(bits=2, base=base, base_options=options).method,
        calibration=text().take(text().split(PvTuning().held_out)[0]),
        progress=False,
    )
    notes, trace = model.trimtab.record.metrics["tuning"], model.trimtab.record.metrics["tuning_trace"]
    assert notes["kl_after"] == min(trace) <= trace[0] == notes["kl_before"]
    if mode != "subspace":  # its forced changes may all hurt in a model as small and on text as random as this
        assert notes["kl_after"] < 0.99 * notes["kl_before"]
    assert (notes["code_changes"] > 0) == (mode != "continuous")
    assert model.trimtab.record.ledger["compressed_bytes"] == plain.trimtab.record.ledger["compressed_bytes"]
    before, after = state_of(plain), state_of(model)
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    teacher = random_model("llama")
    found = Distillation(model, teacher, text()).value(torch.arange(56, 64))
    assert found == pytest.approx(notes["kl_after"], rel=1e-4)
    start = Distillation(plain, teacher, text()).value(torch.arange(56, 64))
    assert start == pytest.approx(notes["kl_before"], rel=1e-4)


def test_the_base_does_not_know_the_text_by_which_the_best_state_is_chosen() -> None:
    """Else its own loss there would be lower than on any other text, and no step would be kept."""
    first, whole = text().take(text().split(PvTuning().held_out)[0]), text()
    other = whole.tokens.clone()
    other[-8:] = 5
    options: dict[str, Any] = {"bits": 2, "base_options": ("group_size=16",), "mode": "ste", "steps": 2}
    states = []
    for calibration in (whole, CalibrationSet.from_tokens(other)):
        method = PvTuning(**options, lr=1.0, code_lr=1.0)  # steps that only hurt: the base is what remains
        states.append(state_of(tt.compress(random_model("llama"), method, calibration=calibration, progress=False)))
    gptq = tt.weights.Gptq(bits=2, group_size=16)
    states.append(state_of(tt.compress(random_model("llama"), gptq, calibration=first, progress=False)))
    assert all(torch.equal(a, states[1][name]) and torch.equal(a, states[2][name]) for name, a in states[0].items())


def test_frozen_codes_are_continuous_tuning_exactly() -> None:
    """A code rate so low that nothing can change is the mode without V."""
    found, expected = tuned(code_lr=1e-9, mode="ste"), tuned(mode="continuous")
    a, b = state_of(found), state_of(expected)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert found.trimtab.record.metrics["tuning_trace"] == expected.trimtab.record.metrics["tuning_trace"]
    assert tuned(mode="ste").trimtab.record.metrics["tuning_trace"] != expected.trimtab.record.metrics["tuning_trace"]


def test_a_step_that_only_hurts_leaves_the_base_as_it_was() -> None:
    model = tuned(lr=1.0, code_lr=1.0, mode="ste", steps=4)
    plain = tt.compress(random_model("llama"), tt.weights.Rtn(bits=2, group_size=16), progress=False)
    notes = model.trimtab.record.metrics["tuning"]
    assert notes["kept_step"] == 0
    assert notes["kl_after"] == notes["kl_before"]
    a, b = state_of(model), state_of(plain)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_zero_points_that_are_numbers_are_tuned() -> None:
    options = ("group_size=16", "zero_dtype=float16")
    model = tuned(base_options=options, mode="continuous")
    plain = tt.compress(
        random_model("llama"), PvTuning(bits=2, base="rtn", base_options=options).method, progress=False
    )
    name = "model.layers.0.mlp.up_proj.part0_zeros"
    assert model.state_dict()[name].dtype == torch.float16
    assert not torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_norms_are_trained_if_asked_and_recorded() -> None:
    model, original = tuned(norms=True), random_model("llama")
    changed = model.trimtab.record.changed_dense
    assert sorted(changed) == sorted(n for n, _ in original.named_parameters() if "norm" in n)
    for name in changed:
        assert not torch.equal(model.get_parameter(name), original.get_parameter(name))
    assert tuned().trimtab.record.changed_dense == []


def test_the_original_model_is_not_held_by_the_result_and_gradients_are_gone() -> None:
    model = tuned()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "gtpq"}, "Did you mean 'gptq'"),
        ({"base": "kivi"}, "base='kivi' must be a method that compresses one linear at a time"),
        ({"base": "pv_tuning"}, "neither plans nor tunes"),
        ({"base_options": ("group_size",)}, "holds 'group_size'; write name=value"),
        ({"base_options": ("gruop_size=3",)}, "Did you mean 'group_size'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"max_code_change": 0.0}, r"max_code_change=0\.0 must be above 0"),
        ({"base": "vq", "bits": 8}, "bits=8 cannot be used"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PvTuning(**options)


def test_options_of_the_base_are_read_from_the_command_line() -> None:
    method = PvTuning.from_options({"bits": "2", "base_options": "group_size=32,act_order=true"})
    assert method.method == tt.weights.Gptq(bits=2, group_size=32, act_order=True)
    assert PvTuning.from_options(method.to_dict()) == method
    assert method.needs == {"gram"}
    assert PvTuning(base="rtn").needs == frozenset()


def test_one_sequence_of_text_is_too_little() -> None:
    with pytest.raises(DataError, match="at least 2 calibration sequences"):
        tt.compress(random_model("llama"), PvTuning(base="rtn", base_options=("group_size=16",)),
                    calibration=text(sequences=1), progress=False)  # fmt: skip


def test_the_student_is_restored_when_tuning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Student) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(Student, "pull_back", failing)
    model = random_model("llama")
    with pytest.raises(RuntimeError, match="stop"):
        tt.compress(model, PvTuning(base="rtn", base_options=("group_size=16",)), calibration=text(), progress=False)
    assert "part0_codes" in "".join(model.state_dict())
