"""Magnitude, Wanda, SparseGPT and GBLM: what the papers say of their masks, each shown to notice a broken variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.counting import ledger_of
from trimtab.models.random import random_model
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors import Bitmap, SparseGrid
from trimtab.tensors.metric import InverseCholesky, Metric
from trimtab.tensors.support import SupportPart
from trimtab.weights import Gblm, Magnitude, Sparsegpt, Wanda
from trimtab.weights.base import LinearMethod

Make = Callable[[Tensor], LinearView]
Example = tuple[Tensor, Stats]
ALL: list[type[LinearMethod]] = [Magnitude, Wanda, Sparsegpt]


def pruned(method: LinearMethod, linear: LinearView, stats: Stats | None) -> SupportPart:
    tensor, _ = method.compress(linear, stats)
    (part,) = tensor.parts
    assert isinstance(part, SupportPart)
    return part


def error(weight: Tensor, part: SupportPart, stats: Stats) -> float:
    assert stats.gram is not None
    return Metric.gram(stats.gram).relative_error(weight, part.dequantize())


# Masks and counts


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
def test_rows_of_wanda_and_the_whole_of_magnitude_have_exact_counts(
    share: float, linear_of: Make, correlated: Example
) -> None:
    weight, stats = correlated
    rows = pruned(Wanda(sparsity=share), linear_of(weight), stats).mask()
    assert (~rows).sum(dim=1).tolist() == [int(128 * round(share * 100)) // 100] * 96
    whole = pruned(Magnitude(sparsity=share), linear_of(weight), None).mask()
    assert int((~whole).sum()) == 96 * 128 * round(share * 100) // 100 + 1
    assert len(set(whole.sum(dim=1).tolist())) > 1  # not uniform over rows
    assert bool(weight[~whole].abs().max() < weight[whole].abs().min())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize("method", ALL)
def test_every_group_loses_n_of_m(method: Any, pattern: str, linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    n, m = map(int, pattern.split(":"))
    part = pruned(method(sparsity=pattern), linear_of(weight), stats)
    assert bool(((~part.mask()).view(96, -1, m).sum(dim=-1) == n).all())


def test_every_block_of_sparsegpt_loses_the_same_and_rows_do_not(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    mask = pruned(Sparsegpt(sparsity=0.5, block_size=32), linear_of(weight), stats).mask()
    blocks = (~mask).view(96, 4, 32).sum(dim=(0, 2))
    assert blocks.tolist() == [96 * 32 // 2 + 1] * 4
    assert len(set(mask.sum(dim=1).tolist())) > 1


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), Wanda(sparsity="2:4")])
def test_what_is_kept_without_repair_is_exact(method: LinearMethod, linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        part = pruned(method, linear_of(weight.to(dtype)), stats)
        assert part.values.dtype == dtype
        assert torch.equal(part.dequantize(dtype), torch.where(part.mask(), weight.to(dtype), 0))


def test_wanda_of_equally_loud_inputs_is_magnitude_by_rows(linear_of: Make, correlated: Example) -> None:
    weight, _ = correlated
    flat = Stats("s", 10, second_moment=torch.full((128,), 3.0))
    by_rows = pruned(Magnitude(within="row"), linear_of(weight), None)
    assert torch.equal(pruned(Wanda(), linear_of(weight), flat).mask(), by_rows.mask())
    loud = Stats("s", 10, second_moment=torch.arange(1.0, 129.0) ** 2)
    assert not torch.equal(pruned(Wanda(), linear_of(weight), loud).mask(), by_rows.mask())


def test_wanda_takes_the_norm_and_not_its_square(linear_of: Make) -> None:
    linear = linear_of(torch.tensor([[4.0, 1.0, 3.0, 0.9]]))
    stats = Stats(
        "s", 1, second_moment=torch.tensor([1.0, 25.0, 1.0, 9.0])
    )  # scores 4, 5, 3, 2.7; squares 4, 25, 3, 8.1
    assert pruned(Wanda(), linear, stats).mask().tolist() == [[True, True, False, False]]


def test_permuted_inputs_permute_masks(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    assert stats.gram is not None
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    other = Stats("s", stats.count, second_moment=stats.gram.diagonal()[order])
    first = pruned(Wanda(), linear_of(weight), stats).mask()
    second = pruned(Wanda(), linear_of(weight[:, order]), other).mask()
    assert torch.equal(first[:, order], second)
    grouped = pruned(Wanda(sparsity="2:4"), linear_of(weight), stats).mask()
    assert not torch.equal(grouped[:, order], pruned(Wanda(sparsity="2:4"), linear_of(weight[:, order]), other).mask())


# SparseGPT


def test_on_independent_inputs_sparsegpt_is_wanda_by_blocks_and_updates_nothing(linear_of: Make) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    diagonal = torch.linspace(0.1, 4, 32)
    stats = Stats("s", 99, second_moment=diagonal, gram=diagonal.diag())
    found = pruned(Sparsegpt(percdamp=1e-9, block_size=32), linear_of(weight), stats)
    expected = pruned(Wanda(within="matrix"), linear_of(weight), stats)
    assert torch.equal(found.mask(), expected.mask())
    assert torch.equal(found.dequantize(), expected.dequantize())
    flat = Stats("s", 99, second_moment=torch.ones(32), gram=torch.eye(32))
    found = pruned(Sparsegpt(block_size=32), linear_of(weight), flat)
    assert torch.equal(found.mask(), pruned(Magnitude(), linear_of(weight), None).mask())


def test_output_errors_are_in_the_order_of_the_papers(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    for amount in (0.5, "2:4"):
        errors = [error(weight, pruned(method(sparsity=amount), linear_of(weight), stats), stats) for method in ALL]
        magnitude, wanda, sparsegpt = errors
        assert sparsegpt < wanda < 0.7 * magnitude


def without_compensation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant: U is reduced to its diagonal, so no error is pushed on."""
    right = Metric.inverse_cholesky

    def diagonal(self: Metric, damp: float = 0.01) -> InverseCholesky:
        found = right(self, damp)
        return InverseCholesky(found.factor.diagonal().diag(), found.damping, found.dead)

    monkeypatch.setattr(Metric, "inverse_cholesky", diagonal)


def test_the_loss_that_is_noted_is_the_one_of_the_weight(
    linear_of: Make, correlated: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sum e^2 = tr(D H D^T) with the damped H; without compensation it is not."""
    weight, stats = correlated
    assert stats.gram is not None
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(128)

    def both() -> tuple[float, float]:
        tensor, notes = Sparsegpt().compress(linear_of(weight), stats)
        return float(notes["sparsegpt_loss"]), Metric.gram(damped).squared_norm(tensor.dequantize() - weight) / 2

    noted, measured = both()
    assert noted == pytest.approx(measured, rel=1e-3)
    without_compensation(monkeypatch)
    noted, measured = both()
    assert noted != pytest.approx(measured, rel=1e-2)


def test_masks_of_later_blocks_see_earlier_corrections(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    small = pruned(Sparsegpt(block_size=16), linear_of(weight), stats)
    whole = pruned(Sparsegpt(block_size=128), linear_of(weight), stats)
    assert not torch.equal(small.mask(), whole.mask())


def test_the_size_of_a_block_only_changes_the_speed_of_grouped_masks(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    small = pruned(Sparsegpt(sparsity="2:4", block_size=8), linear_of(weight), stats)
    whole = pruned(Sparsegpt(sparsity="2:4", block_size=128), linear_of(weight), stats)
    assert torch.equal(small.mask(), whole.mask())
    torch.testing.assert_close(small.dequantize(), whole.dequantize(), rtol=1e-3, atol=1e-4)


def test_dead_inputs_are_removed_and_singular_grams_fall_back_by_name(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    assert stats.gram is not None
    gram = stats.gram.clone()
    gram[7] = gram[:, 7] = 0
    tensor, notes = Sparsegpt().compress(linear_of(weight), Stats("s", 99, gram=gram))
    assert notes["dead_columns"] == 1
    assert not bool(tensor.dequantize()[:, 7].any())
    tensor, notes = Sparsegpt().compress(linear_of(weight), Stats("s", 99, gram=torch.zeros(128, 128)))
    assert notes["fallback"] == "wanda"
    assert tensor.dequantize().count_nonzero() == 96 * 64
    indefinite = stats.gram.clone()
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    tensor, notes = Sparsegpt(sparsity="4:8").compress(linear_of(weight), Stats("s", 99, gram=indefinite))
    assert "not positive definite" in str(notes["fallback_reason"])
    assert bool((tensor.dequantize().view(-1, 8).count_nonzero(dim=1) == 4).all())


# Kept values of 4 bits


def test_sparsegpt_rounds_as_it_goes_and_beats_rounding_at_the_end(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    for amount in (0.5, "2:4"):
        joint = pruned(Sparsegpt(sparsity=amount, value_bits=4), linear_of(weight), stats)
        alone = pruned(Sparsegpt(sparsity=amount), linear_of(weight), stats)
        assert isinstance(joint, SparseGrid)
        assert joint.scales.shape == (96, 2)
        after = SparseGrid.from_dense(alone.dequantize(), alone.mask())
        errors = [error(weight, part, stats) for part in (alone, joint, after)]
        assert errors[0] < errors[1] < 0.9 * errors[2]
        assert 8 * joint.nbytes < 3.6 * weight.numel()  # of 128 columns


def test_a_repair_by_sweep_rounds_as_it_goes_too(linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    joint = pruned(Wanda(repair="obs", value_bits=4), linear_of(weight), stats)
    repaired = pruned(Wanda(repair="obs"), linear_of(weight), stats)
    after = SparseGrid.from_dense(repaired.dequantize(), repaired.mask(), 64)
    assert error(weight, joint, stats) < error(weight, after, stats)


def test_the_loss_that_is_noted_counts_what_is_rounded(linear_of: Make, correlated: Example) -> None:
    """sum e^2 = tr(D H D^T) of the stored weight: scales and codes that are stored are those of the sweep."""
    weight, stats = correlated
    assert stats.gram is not None
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(128)
    tensor, notes = Sparsegpt(value_bits=4).compress(linear_of(weight), stats)
    measured = Metric.gram(damped).squared_norm(tensor.dequantize() - weight) / 2
    assert float(notes["sparsegpt_loss"]) == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("method", [Wanda(value_bits=4), Wanda(value_bits=4, repair="obs"), Magnitude(value_bits=4)])
def test_rounding_changes_no_choice(method: Any, linear_of: Make, correlated: Example) -> None:
    weight, stats = correlated
    part = pruned(method, linear_of(weight), stats)
    exact = pruned(replace(method, value_bits=None), linear_of(weight), stats)
    assert isinstance(part, SparseGrid)
    assert torch.equal(part.mask(), exact.mask())
    assert 0 < error(exact.dequantize(), part, stats) < 0.15


def test_options_of_rounded_values_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="value_bits=4 and value_dtype='float16' exclude"):
        Wanda(value_bits=4, value_dtype="float16")
    with pytest.raises(ConfigError, match="option value_group=100: groups of 100 columns"):
        Wanda(value_bits=4, value_group=100)
    with pytest.raises(ConfigError, match="option value_group=192 must divide block_size=128"):
        Sparsegpt(value_bits=4, value_group=192)
    with pytest.raises(ConfigError, match="option value_bits=3"):
        Wanda(value_bits=3)  # type: ignore[arg-type]


# GBLM


def gblm_masks(calibration: CalibrationSet, **options: Any) -> dict[str, Tensor]:
    model = random_model("llama")
    tt.compress(model, Gblm(**options), calibration=calibration, progress=False)
    return {
        linear.name: linear.compressed.dequantize() != 0
        for linear in ModelView.of(model).linears
        if linear.compressed is not None
    }


def test_gblm_without_gradients_is_wanda_to_the_bit(calibration: CalibrationSet) -> None:
    model = random_model("llama")
    tt.compress(model, Wanda(), calibration=calibration, progress=False)
    other = random_model("llama")
    tt.compress(other, Gblm(alpha=0.0), calibration=calibration, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    gradient = gblm_masks(calibration)
    assert any(
        not torch.equal(linear.compressed.dequantize() != 0, gradient[linear.name])
        for linear in ModelView.of(model).linears
        if linear.compressed is not None
    )


def test_the_two_norms_of_one_sequence_are_the_same(calibration: CalibrationSet) -> None:
    one = CalibrationSet.from_tokens(calibration.tokens[:1])
    first, second = gblm_masks(one, norm="l1", alpha=1.0), gblm_masks(one, norm="l2", alpha=128**0.5)
    same = [float((first[name] == second[name]).float().mean()) for name in first]
    assert min(same) > 0.99  # the roots round differently in bfloat16


def test_gblm_scores_by_the_formula_of_its_code(calibration: CalibrationSet) -> None:
    """|W| (sqrt(scaler_row) + 128 / N * sum_s |alpha g_s|): in the first layer, whose input no pruning has changed.

    alpha is such that both terms count."""
    model = random_model("llama")
    linear = ModelView.of(model).linears[0]
    inputs: list[Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    total = torch.zeros_like(linear.weight)
    for tokens, mask in zip(calibration.tokens, calibration.mask, strict=True):
        model.zero_grad()
        sequence = tokens[mask]
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, sequence[1:]).backward()
        gradient = linear.module.weight.grad
        assert isinstance(gradient, Tensor)
        total += gradient.abs()
    handle.remove()
    n = len(calibration.tokens)
    scaler_row = torch.cat([x.reshape(-1, 48) for x in inputs]).square().sum(dim=0) / n
    alpha = float(scaler_row.sqrt().median() / (128 / n * total).median())
    score = linear.weight.abs() * (scaler_row.sqrt() + alpha * 128 / n * total)
    removed = torch.zeros_like(score, dtype=torch.bool).scatter_(
        1, score.sort(dim=1, stable=True).indices[:, :24], True
    )
    mask = gblm_masks(calibration, alpha=alpha)[linear.name]
    assert float((mask == ~removed).float().mean()) > 0.99  # sums are kept in bfloat16


# Whole models


def test_one_threshold_over_the_model_removes_the_exact_number(calibration: CalibrationSet) -> None:
    for method in (Magnitude(within="model", sparsity=0.4), Wanda(within="model", sparsity=0.4)):
        model = random_model("llama")
        entries = sum(x.weight.numel() for x in ModelView.of(model).linears)
        tt.compress(model, method, calibration=calibration, progress=False)
        kept = [m.tensor.parts[0] for m in model.modules() if isinstance(m, CompressedLinear)]
        assert sum(int((~part.mask()).sum()) for part in kept if isinstance(part, Bitmap)) == entries * 4 // 10 + 1
        assert len({round(part.density, 3) for part in kept if isinstance(part, Bitmap)}) > 3


@pytest.mark.parametrize("amount", [0.5, "2:4"])
def test_half_of_ref_mini_is_small_on_disk_and_reloads_in_plain_transformers(
    amount: float | str, tmp_path: Path
) -> None:
    model = tt.load("ref-mini")
    dense = {x.name: x.weight.clone() for x in ModelView.of(model).linears}
    nbytes = sum(2 * weight.numel() for weight in dense.values())
    tt.compress(model, Magnitude(sparsity=amount, within="row"), progress=False)
    ledger = ledger_of(model)
    assert ledger.compressed_bytes <= 0.59 * nbytes  # 0.58 from 256 columns on; its rows have fewer
    tt.save(model, tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert ledger.bytes_at_rest < size < ledger.bytes_at_rest + 20_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    for linear in ModelView.of(again).linears:
        assert linear.compressed is not None
        kept = linear.compressed.dequantize(torch.bfloat16)
        assert torch.equal(kept, torch.where(kept != 0, dense[linear.name], 0))


# Faults


@pytest.mark.parametrize("method", [Magnitude, Wanda, Sparsegpt, Gblm])
@pytest.mark.parametrize("sparsity", [0, 1.0, -0.1, "5:4", "lots"])
def test_sparsities_that_cannot_be_are_refused(method: Any, sparsity: float | str) -> None:
    with pytest.raises(ConfigError, match=f"{method.__name__}: option sparsity="):
        method(sparsity=sparsity)


@pytest.mark.parametrize("method", [Magnitude, Wanda, Sparsegpt])
def test_patterns_that_do_not_divide_and_counts_of_nothing_are_refused_before_any_work(
    method: Any, calibration: CalibrationSet
) -> None:
    model = random_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"block_size": 130} if method is Sparsegpt else {}
    with pytest.raises(TargetError, match=r"q_proj \(role q\): 5:10 .* does not divide 48"):
        tt.compress(model, method(sparsity="5:10", **options), calibration=calibration, progress=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_keeping_or_removing_nothing_is_refused(linear_of: Make) -> None:
    linear = linear_of(torch.randn(2, 8))
    with pytest.raises(TargetError, match=r"sparsity=0\.1 removes nothing \(0 of the 8 entries of a row\)"):
        Wanda(sparsity=0.1).check_linear(linear)
    with pytest.raises(TargetError, match=r"removes everything \(16 of the 16 entries of the matrix\)"):
        Magnitude(sparsity=0.95).check_linear(linear)
    with pytest.raises(TargetError, match=r"removes everything \(16 of the 16 entries of the last block"):
        Sparsegpt(sparsity=0.95).check_linear(linear)
    with pytest.raises(TargetError, match=r"torch\.float64 values cannot be stored; set value_dtype"):
        Wanda().check_linear(linear_of(torch.randn(2, 8, dtype=torch.float64)))


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="percdamp=0"):
        Sparsegpt(percdamp=0.0)
    with pytest.raises(ConfigError, match="block_size=6 must be a multiple of 4"):
        Sparsegpt(sparsity="2:4", block_size=6)
    with pytest.raises(ConfigError, match="alpha=-1"):
        Gblm(alpha=-1.0)
    with pytest.raises(ConfigError, match="gradient_memory='0.5' must be a size"):
        Gblm(gradient_memory="0.5")
