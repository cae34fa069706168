"""Training a compressed model: gradients of the parts are those of autograd, memory is cut in chunks, nothing stays."""

from __future__ import annotations

import copy
from functools import reduce

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import DataError, NumericsError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.weights import _distillation
from trimtab.weights._distillation import Distillation, kl_divergence, last_hidden, logits_of, squared_error
from trimtab.weights._student import Student
from trimtab.weights.rtn import Rtn

RTN = Rtn(bits=3, group_size=16)


def padded() -> CalibrationSet:
    """6 sequences of 20 tokens, two of them shorter."""
    tokens = torch.randint(3, 131, (6, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 15:] = mask[4, 7:] = False
    return CalibrationSet.from_tokens(tokens, mask)


def pair(family: str = "llama", **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model rounded to 3 bits, and the original."""
    teacher = random_model(family, **options)  # type: ignore[arg-type]
    student = tt.compress(copy.deepcopy(teacher), RTN, progress=False)
    return student, teacher


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_of_last_hidden_states_are_the_models_own(family: str) -> None:
    model, text = random_model(family), padded()
    if family == "gemma2":
        model.config.final_logit_softcapping = 2.0
    with torch.no_grad():
        expected = model(input_ids=text.tokens, attention_mask=text.mask.long()).logits[text.mask]
        found = logits_of(model, last_hidden(model, text.tokens, text.mask)[text.mask])
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("loss", [kl_divergence, squared_error])
def test_the_loss_in_chunks_and_its_gradient_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, loss: _distillation.LogitLoss
) -> None:
    student, teacher = pair()
    text, chosen = padded(), torch.tensor([0, 1, 4])
    monkeypatch.setattr(_distillation, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(_distillation, "_FORWARD_TOKENS", 40)
    with Student(student) as inside:
        found = Distillation(student, teacher, text, loss).backward(chosen)
        gradients = [layer.gradient for layer in inside.layers]
        inside.zero_gradients()
        tokens, mask = text.tokens[chosen], text.mask[chosen]
        logits = [m(input_ids=tokens, attention_mask=mask.long()).logits[mask] for m in (student, teacher)]
        expected = loss(*logits) / int(mask.sum())
        expected.backward()  # type: ignore[no-untyped-call]
        assert found == pytest.approx(float(expected.detach()), rel=1e-5)
        for layer, gradient in zip(inside.layers, gradients, strict=True):
            torch.testing.assert_close(gradient, layer.gradient, rtol=1e-3, atol=1e-6)
    if loss is kl_divergence:
        both = [value.log_softmax(-1) for value in logits]
        torch.testing.assert_close(
            expected, nn.functional.kl_div(both[0], both[1], log_target=True, reduction="batchmean")
        )


def test_gradients_of_numbers_are_those_of_autograd_through_the_weight() -> None:
    """Of scales: sum of G (code - zero) over the group, which is what backward through `Part.dense` gives."""
    student, teacher = pair()
    with Student(student) as inside:
        Distillation(student, teacher, padded()).backward(torch.arange(6))
        inside.pull_back()
        for layer in inside.layers:
            (part,) = layer.tensor.parts
            codes, zeros = part.codes().float(), part.zeros.float().repeat_interleave(16, dim=1)  # type: ignore[attr-defined]
            expected = ((codes - zeros) * layer.gradient).unflatten(1, (-1, 16)).sum(-1)
            torch.testing.assert_close(layer.numbers[0]["scales"].grad, expected, rtol=1e-4, atol=1e-6)


def test_leaving_restores_the_model_also_after_an_error() -> None:
    student, teacher = pair()
    before, flags = state_of(student), [p.requires_grad for p in student.parameters()]
    norm = "model.norm.weight"
    with pytest.raises(RuntimeError, match="stop"), Student(student, (norm,)) as inside:
        assert not any(isinstance(m, CompressedLinear) for m in student.modules())
        Distillation(student, teacher, padded()).backward(torch.arange(2))
        inside.pull_back()
        with torch.no_grad():
            for leaf in inside.numbers():
                assert leaf.grad is not None
                leaf -= 0.1 * leaf.grad
        inside.refresh()
        raise RuntimeError("stop")
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in student.parameters()] == flags


def test_a_snapshot_is_what_the_model_then_computes() -> None:
    student, teacher = pair()
    norm = "model.norm.weight"
    nbytes = sum(t.numel() * t.element_size() for t in student.state_dict().values())
    text = padded()
    with Student(student, (norm,)) as inside:
        loss = Distillation(student, teacher, text)
        start = loss.backward(torch.arange(6))
        inside.pull_back()
        with torch.no_grad():
            for leaf in inside.numbers():
                assert leaf.grad is not None
                leaf -= 0.01 * leaf.grad
        inside.refresh()
        snapshot = inside.snapshot()
        inside.load(snapshot)
        expected = loss.value(torch.arange(6))
    assert expected < start
    snapshot.install(student)
    assert Distillation(student, teacher, text).value(torch.arange(6)) == pytest.approx(expected, rel=1e-5)
    assert sum(t.numel() * t.element_size() for t in student.state_dict().values()) == nbytes
    assert not torch.equal(student.get_parameter(norm), teacher.get_parameter(norm))


def test_positive_numbers_stay_positive() -> None:
    student, _ = pair()
    with Student(student) as inside:
        with torch.no_grad():
            for leaf in inside.numbers():
                leaf -= 100
        inside.refresh()
        snapshot = inside.snapshot()
    assert all(bool((t.state()["0.scales"] > 0).all()) for t in snapshot.tensors.values())


def test_the_split_keeps_the_end_of_the_text_apart_and_refuses_a_single_sequence() -> None:
    train, held = padded().split(0.3)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2, 3], [4, 5])
    assert torch.equal(padded().take(train).tokens, padded().tokens[:4])
    assert torch.equal(padded().take(train).mask, padded().mask[:4])
    one = CalibrationSet.from_tokens(torch.full((1, 8), 5))
    with pytest.raises(DataError, match="at least 2 calibration sequences"):
        one.split(0.3)


def test_batches_cover_each_epoch_once_and_repeat_with_the_seed() -> None:
    student, teacher = pair()
    loss = Distillation(student, teacher, padded())
    taken = [list(zip(range(6), loss.batches(torch.arange(6), 2, seed), strict=False)) for seed in (1, 1, 2)]
    flat = [torch.cat([batch for _, batch in batches]).tolist() for batches in taken]
    assert flat[0] == flat[1] != flat[2]
    assert sorted(flat[0][:6]) == sorted(flat[0][6:]) == list(range(6))


def test_gradients_that_are_not_finite_are_named() -> None:
    student, _ = pair()
    with Student(student) as inside, pytest.raises(NumericsError, match=r"layers\.0\.self_attn\.q_proj: .* missing"):
        inside.pull_back()


def test_the_parts_of_a_layer_are_summed() -> None:
    student, _ = pair()
    with Student(student) as inside:
        for layer in inside.layers:
            expected = reduce(torch.add, (part.dequantize() for part in layer.tensor.parts))
            assert torch.equal(layer.dense.weight, expected)
