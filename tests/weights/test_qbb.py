"""Binary bases: the identities of their three stages. Error orders on Gaussian rows are those that theory gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import random_model
from trimtab.tensors.binary import BinaryBases, sign_table
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.weights._binary_distillation import _hybrid_loss, _most_different, held_out_loss, write_sequences
from trimtab.weights._binary_fit import Bases, alternate, by_gradient, greedy, least_squares
from trimtab.weights._tuning import Tuning
from trimtab.weights.qbb import Qbb


def gaussian(rows: int = 16, columns: int = 2048, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative(weight: Tensor, bases: Bases) -> float:
    return float(bases.row_errors(weight).sum() / weight.square().sum())


# Stage 1


def test_each_greedy_base_lowers_a_rows_error_by_in_alpha_squared() -> None:
    weight = gaussian()
    for count in (1, 2, 3, 4):
        bases = greedy(weight, count)
        before = weight if count == 1 else weight - greedy(weight, count - 1).dense()
        drop = before.square().sum(1) - bases.row_errors(weight)
        assert torch.allclose(drop, 2048 * bases.alphas[-1].square(), rtol=1e-4)


def test_greedy_error_of_gaussian_rows() -> None:
    """1 - 2 / pi for one base; the others from the same recursion, measured by the method's sheet."""
    weight = gaussian(64, 4096)
    found = [relative(weight, greedy(weight, count)) for count in (1, 2, 3, 4)]
    assert found == pytest.approx([1 - 2 / math.pi, 0.131, 0.0586, 0.0329], rel=0.02)


def test_the_sign_of_zero_is_plus_one_and_scales_belong_to_rows() -> None:
    bases = greedy(torch.tensor([[0.0, 2.0], [-4.0, 4.0]]), 1)
    assert torch.equal(bases.signs[0], torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
    assert torch.equal(bases.alphas[0], torch.tensor([1.0, 4.0]))


# Stage 2


@pytest.mark.parametrize(("bases", "expected"), [(2, 0.1168), (3, 0.0365), (4, 0.0116)])
def test_alternating_refinement_of_gaussian_rows(bases: int, expected: float) -> None:
    weight = gaussian(64, 4096)
    assert relative(weight, alternate(weight, greedy(weight, bases), 15)) == pytest.approx(expected, rel=0.03)


def test_alternating_refinement_never_raises_a_rows_error() -> None:
    weight = gaussian(32, 512)
    last = greedy(weight, 3).row_errors(weight)
    for rounds in range(1, 8):
        now = alternate(weight, greedy(weight, 3), rounds).row_errors(weight)
        assert bool((now <= last * (1 + 1e-6)).all())
        last = now


def test_four_refined_bases_beat_four_bit_rows_and_greedy_ones_do_not() -> None:
    weight = gaussian(64, 4096)
    rows = GroupGrid.quantize(weight, GridFormat(bits=4, group_size=-1, symmetric=False)).dequantize()
    grid = float((rows - weight).square().sum() / weight.square().sum())
    start = greedy(weight, 4)
    assert relative(weight, alternate(weight, start, 15)) < grid < relative(weight, start)


def test_gradients_on_signs_are_no_worse_than_the_start_in_any_row() -> None:
    weight = gaussian(16, 256)
    start = greedy(weight, 3)
    for progressive in (True, False):
        found = by_gradient(weight, start, progressive=progressive, steps=40)
        assert bool((found.row_errors(weight) <= least_squares(weight, start.signs).row_errors(weight) * 1.00001).all())
    assert relative(weight, found) < relative(weight, start)


def test_a_uniform_grid_of_a_row_is_bases_with_a_constant() -> None:
    """`s (q - z) = sum_k s 2^(k-1) B_k + s ((2^b - 1) / 2 - z)`: so refinement with a constant contains it."""
    weight = gaussian(8, 512)
    grid = GroupGrid.quantize(weight, GridFormat(bits=3, group_size=-1, symmetric=False, scale_dtype="float32"))
    assert grid.zeros is not None
    scale, zero = grid.scales[:, 0], grid.zeros[:, 0].float()
    alphas = torch.stack([scale * 2.0 ** (k - 1) for k in range(3)])
    same = BinaryBases.nearest(grid.dequantize(), alphas, scale * (3.5 - zero))
    assert torch.allclose(same.dequantize(), grid.dequantize(), atol=1e-6)
    assert torch.equal(same.codes(), grid.codes())
    refined = alternate(
        weight,
        Bases(torch.stack([((grid.codes() >> k) & 1).float() * 2 - 1 for k in range(3)]), alphas),
        3,
        constant=True,
    )
    assert bool((refined.row_errors(weight) <= (grid.dequantize() - weight).square().sum(1) * 1.00001).all())


def test_equal_bases_have_scales_too() -> None:
    signs = torch.ones(2, 1, 8)
    assert float(least_squares(torch.full((1, 8), 3.0), signs).alphas.sum()) == pytest.approx(3, rel=1e-5)


# The part


def test_packed_signs_multiply_as_the_dense_sum_in_float64() -> None:
    weight = gaussian(7, 75)
    bases = alternate(weight, greedy(weight, 3), 5)
    part = BinaryBases.nearest(weight, bases.alphas)
    codes = part.codes().long()
    signs = sign_table(3, torch.zeros(1, dtype=torch.float64))[codes]  # [out, in, N]
    dense = (signs * bases.alphas.t()[:, None].double()).sum(-1)
    x = torch.randn(5, 75, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(part.matmul(x.float()).double(), x @ dense.t(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(part.dequantize().double(), dense, rtol=1e-6, atol=1e-6)
    assert torch.equal(BinaryBases.from_signs(signs.permute(2, 0, 1).float(), bases.alphas).codes(), part.codes())


def test_bytes_are_those_of_bit_planes_and_row_scales() -> None:
    part = BinaryBases.nearest(gaussian(16, 1024), torch.rand(4, 16).half())
    assert part.nbytes == 16 * 1024 * 4 // 8 + 2 * 4 * 16


def test_bad_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"alphas \[5, 16\] do not fit"):
        BinaryBases.nearest(gaussian(16, 64), torch.rand(5, 16).half())
    part = BinaryBases.nearest(gaussian(16, 64), torch.rand(2, 16).half())
    with pytest.raises(CheckpointError, match="'bases' must be one of"):
        BinaryBases.buffers({**part.spec(), "bases": 7})
    part.alphas[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        part.check()


# The method and stage 3


def test_options_that_cannot_be_are_refused() -> None:
    for options, words in (
        ({"rounds": 0}, "rounds=0"),
        ({"keep_fraction": 0.0}, "keep_fraction"),
        ({"learning_rate": 0.0}, "positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            Qbb(**options)
    with pytest.raises(ConfigError, match="constant=true needs refine=alternating"):
        Qbb(constant=True, refine="none")


def test_starting_from_gptq_needs_text_and_begins_there(calibration: CalibrationSet) -> None:
    assert not Qbb().needs_text
    assert Qbb(start="gptq").needs_text
    model = random_model("llama")
    tt.compress(model, Qbb(bits=4, start="gptq", holistic=False), calibration=calibration, progress=False)
    other = tt.compress(random_model("llama"), Qbb(bits=4, holistic=False), progress=False)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(model.get_submodule(name).dequantize(), other.get_submodule(name).dequantize())


SMALL = {"bits": 3, "sequences": 48, "length": 16, "learning_rate": 5e-3}
BLOCKS = ["model.layers.0", "model.layers.1"]


def test_training_scales_lowers_the_loss_and_leaves_the_signs() -> None:
    """On written text of another seed too."""
    before = tt.compress(random_model("llama"), Qbb(**SMALL, holistic=False), progress=False)
    after = tt.compress(random_model("llama"), Qbb(**SMALL), progress=False)
    told = after.trimtab.record.metrics["tuning"]
    assert told["held_out_loss"] < told["held_out_loss_before"]
    other = write_sequences(random_model("llama"), 16, 16, torch.Generator().manual_seed(99))
    losses = [
        held_out_loss(Tuning(model, random_model("llama"), None, 0, after.trimtab.record, False), BLOCKS, other)
        for model in (before, after)
    ]
    assert losses[1] < losses[0]
    changed = 0
    for name, layer in before.named_modules():
        if isinstance(layer, CompressedLinear):
            tuned = after.get_submodule(name).stored()
            assert torch.equal(layer.stored()["part0_codes"], tuned["part0_codes"])
            changed += not torch.equal(layer.stored()["part0_alphas"], tuned["part0_alphas"])
    assert changed > 0
    assert all(p.requires_grad for p in after.parameters()) == all(
        p.requires_grad for p in random_model("llama").parameters()
    )


def test_sequences_are_written_by_the_original_and_reproducible() -> None:
    model = random_model("llama")
    first, again = (write_sequences(model, 6, 12, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (6, 12)
    assert not torch.equal(first, write_sequences(model, 6, 12, torch.Generator().manual_seed(4)))


def test_the_sequences_kept_are_those_of_the_largest_gap() -> None:
    """Not those on which the compressed model is least sure."""
    teacher = random_model("llama")
    student = tt.compress(random_model("llama"), Qbb(**SMALL, holistic=False), progress=False)
    sequences = write_sequences(teacher, 24, 16, torch.Generator().manual_seed(0))
    kept = _most_different(Tuning(student, teacher, None, 0, student.trimtab.record, False), sequences, 5)
    with torch.no_grad():
        gaps = [
            float((teacher(input_ids=s[None]).logits - student(input_ids=s[None]).logits).square().mean())
            for s in sequences
        ]
    best = sorted(range(24), key=lambda i: -gaps[i])[:5]
    assert torch.equal(kept, sequences[best])


def test_a_hybrid_of_original_blocks_has_no_loss() -> None:
    teacher = random_model("llama")
    student = tt.compress(random_model("llama"), Qbb(**SMALL, holistic=False), progress=False)
    tuning = Tuning(student, teacher, None, 0, student.trimtab.record, False)
    batch = write_sequences(teacher, 4, 16, torch.Generator().manual_seed(0))
    modules = [student.get_submodule(name) for name in BLOCKS]
    with torch.no_grad():
        assert float(_hybrid_loss(tuning, BLOCKS, batch, 0.0, torch.Generator().manual_seed(0))) < 1e-10
        assert float(_hybrid_loss(tuning, BLOCKS, batch, 1.0, torch.Generator().manual_seed(0))) > 1e-3
    assert list(student.model.layers) == modules
