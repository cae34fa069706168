"""Norms of gradients: those of autograd, sequence by sequence, however little memory there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.models import gradient_norms as module
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.gradient_norms import gradient_norms
from trimtab.models.random import random_model
from trimtab.models.views import ModelView

TOKENS = torch.randint(3, 131, (5, 16), generator=torch.Generator().manual_seed(3))


def by_autograd(model: PreTrainedModel, tokens: Tensor, order: int, length: int | None = None) -> dict[str, Tensor]:
    """The definition: parameters' gradients of each sequence's loss."""
    totals: dict[str, Tensor] = {}
    for sequence in tokens:
        model.zero_grad()
        sequence = sequence[:length]
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, sequence[1:]).backward()
        for linear in ModelView.of(model).linears:
            gradient = linear.module.weight.grad
            assert isinstance(gradient, Tensor)
            gradient = gradient.T if linear.transposed else gradient
            term = gradient.abs() if order == 1 else gradient.square()
            totals[linear.name] = totals.get(linear.name, torch.zeros(())) + term
    model.zero_grad()
    return totals if order == 1 else {name: total.sqrt() for name, total in totals.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To the last place of bfloat16."""
    assert found.keys() == expected.keys()
    return all(
        torch.allclose(found[name].float(), expected[name], rtol=2**-7, atol=1e-4 * float(expected[name].max()))
        for name in found
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("order", [1, 2])
def test_equals_the_gradients_of_autograd(family: str, order: Any) -> None:
    model = random_model(family).eval()
    expected = by_autograd(model, TOKENS, order)
    found = gradient_norms(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS), order=order)
    assert close(found, expected)
    assert all(norm.dtype == torch.bfloat16 for norm in found.values())
    assert not close(found, by_autograd(model, TOKENS, 3 - order))


def test_gradients_of_sequences_do_not_cancel() -> None:
    """The broken variant, the gradient of the summed loss, is smaller."""
    model = random_model("llama").eval()
    found = gradient_norms(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS))
    model.zero_grad()
    for sequence in TOKENS:
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, sequence[1:]).backward()
    for linear in ModelView.of(model).linears:
        signed = linear.module.weight.grad
        assert isinstance(signed, Tensor)
        assert float(signed.abs().sum()) < 0.8 * float(found[linear.name].float().sum())


@pytest.mark.parametrize("memory", [1, 50_000])
def test_less_memory_means_more_passes_and_the_same_norms(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama").eval()
    linears = ModelView.of(model).linears
    calibration = CalibrationSet.from_tokens(TOKENS)
    whole = gradient_norms(model, linears, calibration)
    held: list[int] = []
    watched = module.watched

    def counting(model: PreTrainedModel, own: Any) -> Any:
        held.append(sum(4 * linear.out_features * linear.in_features for linear, _ in own))
        return watched(model, own)

    monkeypatch.setattr(module, "watched", counting)
    parts = gradient_norms(model, linears, calibration, memory=memory)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    largest = max(4 * linear.out_features * linear.in_features for linear in linears)
    assert max(held) <= max(memory, largest)
    assert sum(held) == sum(4 * linear.out_features * linear.in_features for linear in linears)
    if memory == 1:
        assert len(held) == len(linears)


def test_padding_enters_no_loss_and_the_model_is_left_alone() -> None:
    model = random_model("llama").train()
    linears = ModelView.of(model).linears
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 10:] = False
    found = gradient_norms(model, linears, CalibrationSet.from_tokens(TOKENS, mask))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in part.__dict__ for part in model.modules())
    assert close(found, by_autograd(model.eval(), TOKENS, 1, length=10))


def test_what_cannot_be_differentiated_is_named() -> None:
    model = random_model("llama").eval()
    linears = ModelView.of(model).linears
    with pytest.raises(DataError, match="at least two tokens"):
        gradient_norms(model, linears, CalibrationSet.from_tokens(TOKENS[:, :1]))
    with pytest.raises(DataError, match="longer than the model's context of 128"):
        gradient_norms(model, linears, CalibrationSet.from_tokens(TOKENS.repeat(1, 9)))
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight")[2] = torch.nan
    with pytest.raises(NumericsError, match=r"the input of model\.layers\.1\.mlp\.gate_proj is the first"):
        gradient_norms(model, linears, CalibrationSet.from_tokens(TOKENS))
