"""LoftQ: the invariants of the method, each also shown to notice a broken variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.claims import loftq as claims
from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.metric import Metric
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights import loftq
from trimtab.weights.loftq import Loftq
from trimtab.weights.nf import Nf
from trimtab.weights.rtn import Rtn

Make = Callable[[Tensor], LinearView]
QUANTIZERS: list[dict[str, Any]] = [
    {"quantizer": "nf"},
    {"quantizer": "nf", "double_quant": True},
    {"quantizer": "grid"},
    {"quantizer": "uniform", "group_size": -1},
]
quantizers = pytest.mark.parametrize("options", QUANTIZERS, ids=lambda o: "-".join(map(str, o.values())))


def solve(
    linear: LinearView, stats: Stats | None = None, **options: Any
) -> tuple[GroupGrid | LevelTable, LowRank, dict[str, Any]]:
    tensor, notes = Loftq(**options).compress(linear, stats)
    quantized, correction = tensor.parts
    assert isinstance(quantized, (GroupGrid, LevelTable))
    assert isinstance(correction, LowRank)
    return quantized, correction, dict(notes)


def relative_error(weight: Tensor, *parts: GroupGrid | LevelTable | LowRank) -> float:
    """|W - sum of parts|_F / |W|_F."""
    left = weight.clone()
    for part in parts:
        left -= part.dequantize()
    return float(left.norm() / weight.norm())


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_low_rank(seed: int = 0) -> Tensor:
    """[256, 256] with a dominant part of rank 8."""
    return gaussian(256, 8, seed=seed) @ gaussian(8, 256, seed=seed + 1) + 0.3 * gaussian(256, 256, seed=seed + 2)


# 1. the correction never hurts


@quantizers
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("factor_dtype", ["float32", "float16"])
def test_the_correction_lowers_the_error_of_its_own_quantized_weight(
    linear_of: Make, options: dict[str, Any], bits: int, factor_dtype: str
) -> None:
    weight = gaussian(48, 128)
    quantized, correction, notes = solve(linear_of(weight), bits=bits, rank=3, factor_dtype=factor_dtype, **options)
    corrected = relative_error(weight, quantized, correction)
    assert corrected < relative_error(weight, quantized)
    assert corrected == pytest.approx(notes[f"frobenius_error_{notes['chosen_iteration']}"], rel=1e-4)


# 3. the ends of the range of ranks


def test_full_rank_is_exact_and_rank_zero_is_the_quantizer(linear_of: Make) -> None:
    weight = gaussian(24, 64)
    full = solve(linear_of(weight), bits=2, rank=24, iterations=1, factor_dtype="float32")
    assert relative_error(weight, *full[:2]) < 1e-6
    quantized, correction, _ = solve(linear_of(weight), bits=2, rank=0)
    assert torch.equal(quantized.dequantize(), Nf(bits=2).compress(linear_of(weight), None)[0].dequantize())
    assert correction.nbytes == 0


@pytest.mark.parametrize(("quantizer", "alone"), [("nf", Nf), ("grid", Rtn)])
def test_one_iteration_decomposes_what_the_plain_quantizer_leaves(
    linear_of: Make, quantizer: str, alone: type[Nf] | type[Rtn]
) -> None:
    weight = gaussian(48, 128)
    quantized, correction, _ = solve(linear_of(weight), bits=3, rank=4, iterations=1, quantizer=quantizer)
    plain = alone(bits=3).compress(linear_of(weight), None)[0].dequantize()
    assert torch.equal(quantized.dequantize(), plain)
    assert torch.equal(correction.left, svd(weight - plain, 4, dtype=torch.float16).left)


# 4. the stored codes are those of the weight that the factors correct


def factors_fit_the_stored_codes(weight: Tensor, quantized: GroupGrid | LevelTable, correction: LowRank) -> bool:
    expected = svd(weight - quantized.dequantize(), correction.rank, dtype=correction.left.dtype)
    return torch.equal(expected.left, correction.left) and torch.equal(expected.right, correction.right)


@quantizers
@pytest.mark.parametrize("bits", [2, 4])
def test_stored_codes_are_those_that_were_decomposed(linear_of: Make, options: dict[str, Any], bits: int) -> None:
    weight = gaussian(48, 128)
    quantized, correction, _ = solve(linear_of(weight), bits=bits, rank=4, **options)
    assert factors_fit_the_stored_codes(weight, quantized, correction)


@pytest.mark.parametrize("broken", ["other groups", "the weight itself"])
def test_the_check_of_codes_notices_a_second_quantization(
    linear_of: Make, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Saving Q as numbers and quantizing them with other blocks, or quantizing W instead of what the loop quantized."""
    weight = gaussian(48, 128)

    def anew(parts: tuple[LevelTable, LowRank]) -> CompressedTensor:
        source = parts[0].dequantize() if broken == "other groups" else weight
        fmt = TableFormat(bits=2, group_size=32 if broken == "other groups" else 64)
        return CompressedTensor((LevelTable.quantize(source, fmt), parts[1]))

    monkeypatch.setattr(loftq, "CompressedTensor", anew)
    quantized, correction, _ = solve(linear_of(weight), bits=2, rank=4)
    assert not factors_fit_the_stored_codes(weight, quantized, correction)


# 5. the course of the error, and the best turn


def test_the_error_falls_on_gaussian_weights_by_known_amounts(linear_of: Make) -> None:
    """[256, 256], NF4, rank 16: 0.092 alone, 0.072 after five turns."""
    weight = gaussian(256, 256)
    _, _, notes = solve(linear_of(weight), bits=4, rank=16)
    errors = [notes[f"frobenius_error_{turn}"] for turn in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert notes["chosen_iteration"] == 5
    assert relative_error(weight, Nf(bits=4).compress(linear_of(weight), None)[0].parts[0]) == pytest.approx(  # type: ignore[arg-type]
        0.0921, rel=0.01
    )
    assert errors[0] == pytest.approx(0.0818, rel=0.02)
    assert errors[4] == pytest.approx(0.0719, rel=0.03)


def best_turn_is_kept(weight: Tensor, linear: LinearView) -> bool:
    quantized, correction, notes = solve(linear, bits=2, rank=16, iterations=10)
    errors = [notes[f"frobenius_error_{turn}"] for turn in range(1, 11)]
    assert errors[-1] > 1.05 * min(errors)  # else this weight shows nothing
    kept = relative_error(weight, quantized, correction)
    return kept == pytest.approx(min(errors), rel=1e-4) and notes["chosen_iteration"] == 1 + errors.index(min(errors))


def test_the_best_turn_is_kept_where_the_error_rises_again(linear_of: Make) -> None:
    weight = with_low_rank()
    assert best_turn_is_kept(weight, linear_of(weight))


def test_the_check_of_the_best_turn_notices_the_last_one(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's algorithm: whatever the last turn gave."""
    weight = with_low_rank()
    right = Loftq.compress

    def last(self: Loftq, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, dict[str, Any]]:
        _, notes = right(self, linear, stats)
        residual = weight
        for _ in range(self.iterations):
            quantized = self.quantize(residual, self.bits)
            correction = svd(weight - quantized.dequantize(), self.rank, dtype=torch.float16)
            residual = weight - correction.dequantize()
        return CompressedTensor((quantized, correction)), dict(notes)

    monkeypatch.setattr(Loftq, "compress", last)
    assert not best_turn_is_kept(weight, linear_of(weight))


def test_decomposing_first_finds_the_low_rank_part(linear_of: Make) -> None:
    """LQ-LoRA's order: on a weight with a dominant low-rank part at 2 bits, far better than LoftQ's."""
    weight = with_low_rank()
    alone = relative_error(weight, Nf(bits=2).compress(linear_of(weight), None)[0].parts[0])  # type: ignore[arg-type]
    zero, decomposed = (
        relative_error(weight, *solve(linear_of(weight), bits=2, rank=16, init=init)[:2]) for init in ("zero", "svd")
    )
    assert zero < 0.9 * alone
    assert decomposed < 0.5 * zero


# quantizers


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_is_the_papers_formula(linear_of: Make, bits: int) -> None:
    """Clip to mean +- 2 std of the whole matrix; rounding of scale and zero point to float16 is all that differs."""
    weight = gaussian(64, 128) * 0.02 + 0.001
    quantized, _, _ = solve(linear_of(weight), bits=bits, rank=0, quantizer="uniform", group_size=-1)
    low, high = weight.mean() - 2 * weight.std(), weight.mean() + 2 * weight.std()
    step = (high - low) / (2**bits - 1)
    expected = ((weight.clamp(low, high) - low) / step).round() * step + low
    differ = (quantized.dequantize() - expected).abs() > 0.01 * step
    assert float(differ.float().mean()) < 0.01  # values at a boundary
    assert isinstance(quantized, GroupGrid)
    assert len(quantized.scales.unique()) == 1


def test_the_uniform_check_notices_the_full_range(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loftq, "_CLIP_STD", 100.0)
    with pytest.raises(AssertionError):
        test_uniform_is_the_papers_formula(linear_of, 2)


def test_uniform_is_better_than_normal_float_at_2_bits(linear_of: Make) -> None:
    linear = linear_of(gaussian(64, 128))
    uniform = solve(linear, bits=2, rank=4, quantizer="uniform", group_size=-1)
    assert relative_error(linear.weight, *uniform[:2]) < relative_error(
        linear.weight, *solve(linear, bits=2, rank=4)[:2]
    )


def test_the_first_blocks_get_the_high_bits(linear_of: Make) -> None:
    first = linear_of(gaussian(48, 128))
    method = {"bits": 2, "high_bits": 4, "high_blocks": 2, "rank": 2}
    found = [solve(replace(first, block=block), **method)[0].format.bits for block in range(4)]
    assert found == [4, 4, 2, 2]


# the error of the output


def test_weighing_by_the_inputs_lowers_the_error_of_the_output(
    linear_of: Make, correlated: tuple[Tensor, Stats]
) -> None:
    """Four outlier inputs: the norm of the weight does not see them, their mean squares do, the Gram matrix best."""
    weight, stats = correlated
    gram = Metric.gram(stats.gram)  # type: ignore[arg-type]
    errors = {}
    for metric in ("frobenius", "diagonal", "gram"):
        tensor, notes = Loftq(bits=2, quantizer="grid", rank=8, metric=metric, iterations=1).compress(  # type: ignore[arg-type]
            linear_of(weight), stats
        )
        errors[metric] = gram.weighted_norm(weight - tensor.dequantize()) / gram.weighted_norm(weight)
    assert notes["gram_error_1"] == pytest.approx(errors["gram"], rel=1e-4)
    assert errors["gram"] < errors["diagonal"] < errors["frobenius"]


def test_the_gram_correction_is_the_closed_form(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    """CLoQ: SVD_r(D L) L^-1 with H = L L^T, by numpy's own decomposition."""
    weight, stats = correlated
    assert stats.gram is not None
    quantized, correction, _ = solve(
        linear_of(weight), stats, bits=2, rank=8, metric="gram", iterations=1, factor_dtype="float32"
    )
    error = (weight - quantized.dequantize()).double()
    lower = torch.linalg.cholesky(stats.gram.double())
    u, s, v = torch.linalg.svd(error @ lower, full_matrices=False)
    expected = (u[:, :8] * s[:8] @ v[:8] @ torch.linalg.inv(lower)).float()
    torch.testing.assert_close(correction.dequantize(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_the_best_turn_is_chosen_by_the_metric(linear_of: Make, correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    _, _, notes = solve(linear_of(weight), stats, bits=2, rank=8, metric="gram", iterations=6)
    errors = [notes[f"gram_error_{turn}"] for turn in range(1, 7)]
    assert notes["chosen_iteration"] == 1 + errors.index(min(errors))


def test_needs_what_its_metric_reads() -> None:
    assert [set(Loftq(metric=m).needs) for m in ("frobenius", "diagonal", "gram")] == [  # type: ignore[arg-type]
        set(),
        {"second_moment"},
        {"gram"},
    ]


# 2. LoRA's scaling


@pytest.mark.peers
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [4, 8, 16, 1])
def test_factors_divided_by_the_root_of_the_scaling_start_peft_at_the_sum(
    linear_of: Make, alpha: int, rslora: bool
) -> None:
    peft = pytest.importorskip("peft")
    weight = gaussian(48, 64)
    quantized, correction, _ = solve(linear_of(weight), bits=2, rank=4)
    base = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    base[0].weight.data = quantized.dequantize()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
    layer = peft.get_peft_model(base, config).base_model.model[0]
    scaling = alpha / (4**0.5 if rslora else 4)
    layer.lora_B["default"].weight.data = correction.left.float() / scaling**0.5
    layer.lora_A["default"].weight.data = correction.right.float() / scaling**0.5
    x = gaussian(3, 64, seed=9)
    expected = x @ (quantized.dequantize() + correction.dequantize()).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"high_blocks": -1}, "high_blocks=-1 must be at least 0"),
        ({"quantizer": "uniform"}, "group_size=64 does not apply to quantizer='uniform'"),
        ({"quantizer": "grid", "double_quant": True}, "double_quant is for quantizer='nf', not 'grid'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loftq(**options)


def test_a_rank_beyond_the_shorter_side_is_refused_by_name(linear_of: Make) -> None:
    with pytest.raises(TargetError, match=r"block\.up .*rank=49 for a weight of shape \[48, 128\]"):
        Loftq(rank=49).check_linear(linear_of(gaussian(48, 128)))


# 6. the start of fine-tuning


@pytest.mark.slow
def test_training_from_its_factors_reaches_a_lower_loss_than_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """ref-mini at 2 bits after a few steps; and factors in a wrong scaling are noticed."""
    zero = claims.fine_tuned_loss("zero", seed=0, steps=6)
    assert claims.fine_tuned_loss("loftq", seed=0, steps=6) < zero
    right = loftq.svd

    def scaled(error: Tensor, rank: int, metric: Metric, dtype: torch.dtype) -> LowRank:
        return right(8 * error, rank, metric, dtype=dtype)

    monkeypatch.setattr(loftq, "svd", scaled)
    assert claims.fine_tuned_loss("loftq", seed=0, steps=6) > zero
