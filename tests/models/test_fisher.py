"""Fisher information: row and column means equal those of squared per-example gradients, whatever the family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.models import fisher
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.fisher import fisher_information
from trimtab.models.random import random_model
from trimtab.models.views import ModelView

TOKENS = torch.randint(3, 131, (3, 19), generator=torch.Generator().manual_seed(2))


def squared_gradients(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The plain way: the mean over sequences of the squared gradient of the mean loss, [out, in]."""
    view = ModelView.of(model)
    totals = {linear.name: torch.zeros(linear.weight.shape, dtype=torch.float64) for linear in view.linears}
    for row, real in zip(tokens, mask, strict=True):
        model.zero_grad()
        labels = torch.where(real, row, -100)
        model(input_ids=row[None], attention_mask=real[None].long(), labels=labels[None]).loss.backward()
        for linear in view.linears:
            gradient = linear.module.weight.grad
            totals[linear.name] += (gradient.t() if linear.transposed else gradient).double().square()
    model.zero_grad(set_to_none=True)
    return {name: total / len(tokens) for name, total in totals.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_equals_squared_gradients_of_every_family(family: str) -> None:
    model = random_model(family)
    linears = ModelView.of(model).linears
    expected = squared_gradients(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    found = fisher_information(model, linears, CalibrationSet.from_tokens(TOKENS), full=True)
    assert found.keys() == expected.keys()
    for name, information in found.items():
        assert relative(information.rows, expected[name].mean(dim=1)) < 1e-4, name
        assert relative(information.columns, expected[name].mean(dim=0)) < 1e-4, name
        assert information.full is not None
        assert relative(information.full, expected[name]) < 1e-4, name


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, 11:] = False
    mask[2, 3:] = False
    return TOKENS.where(mask, torch.tensor(0)), mask


def test_padding_is_left_out() -> None:
    model = random_model("llama")
    tokens, mask = padded()
    expected = squared_gradients(model, tokens, mask)
    found = fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(tokens, mask))
    for name, information in found.items():
        assert relative(information.rows, expected[name].mean(dim=1)) < 1e-4, name
        assert relative(information.columns, expected[name].mean(dim=0)) < 1e-4, name


def test_the_check_of_padding_notices_that_it_counts() -> None:
    """Were padding read as text, the factors would be far from the truth."""
    model = random_model("llama")
    tokens, mask = padded()
    expected = squared_gradients(model, tokens, mask)
    found = fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(tokens))
    assert min(relative(found[name].rows, expected[name].mean(dim=1)) for name in found) > 0.1


def test_the_truth_notices_a_broken_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of single tokens' gradients, added up: the cross terms of a sequence are missing."""

    def by_token(self: fisher._Sums, inputs: Tensor, gradients: Tensor) -> None:
        x, d = inputs[0].double(), gradients[0].double()
        self.rows += (d.square() * x.square().sum(dim=1, keepdim=True)).sum(dim=0)
        self.columns += (x.square() * d.square().sum(dim=1, keepdim=True)).sum(dim=0)

    monkeypatch.setattr(fisher._Sums, "add", by_token)
    model = random_model("llama")
    expected = squared_gradients(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    found = fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS))
    assert min(relative(found[name].rows, expected[name].mean(dim=1)) for name in found) > 0.05


def test_leaves_the_model_as_it_was() -> None:
    model = random_model("llama").train()
    model.lm_head.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fisher_information(model, ModelView.of(model).select(("q_proj",)), CalibrationSet.from_tokens(TOKENS))
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_are_run_again_instead_of_kept() -> None:
    """Every linear of a block runs twice for one sequence, so that only the blocks' inputs wait for the way back."""
    model = random_model("llama")
    norm = ModelView.of(model).blocks[0].mlp.norm
    calls = 0

    def count(module: object, arguments: object) -> None:
        nonlocal calls
        calls += 1

    norm.register_forward_pre_hook(count)
    fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS))
    assert calls == 2 * len(TOKENS)


def test_bfloat16_models_are_read() -> None:
    model = random_model("llama", dtype=torch.bfloat16)
    found = fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS))
    exact = squared_gradients(model.float(), TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    assert all(relative(information.rows, exact[name].mean(dim=1)) < 0.2 for name, information in found.items())


def test_infinite_weights_are_named_as_a_cause() -> None:
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(NumericsError, match="loss of LlamaForCausalLM on the calibration text is nan"):
        fisher_information(model, ModelView.of(model).linears, CalibrationSet.from_tokens(TOKENS))


def test_sequences_that_cannot_be_used_are_refused() -> None:
    model = random_model("llama")
    linears = ModelView.of(model).linears
    with pytest.raises(DataError, match="at least two tokens"):
        fisher_information(model, linears, CalibrationSet.from_tokens(TOKENS[:, :1]))
    long = torch.zeros((1, model.config.max_position_embeddings + 1), dtype=torch.int64)
    with pytest.raises(DataError, match="longer than the model's context"):
        fisher_information(model, linears, CalibrationSet.from_tokens(long))
