"""Block influence: what the definition says, over tokens that are not padding, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import NumericsError
from trimtab.models.block_influence import block_influence
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView

TOKENS = torch.randint(3, 131, (6, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_is_one_minus_the_mean_cosine_of_hidden_states(family: str) -> None:
    model = random_model(family)
    found = block_influence(ModelView.of(model), CalibrationSet.from_tokens(TOKENS), chunk_tokens=40)
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in ModelView.of(model).blocks:
        block.module.register_forward_hook(
            lambda module, args, out: states.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert list(found) == [block.name for block in ModelView.of(model).blocks]
    for value, (before, after) in zip(found.values(), states, strict=True):
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert value == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_padding_does_not_count() -> None:
    model = random_model("llama")
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 12:] = False
    padded = block_influence(ModelView.of(model), CalibrationSet.from_tokens(TOKENS, mask))
    cut = block_influence(ModelView.of(model), CalibrationSet.from_tokens(TOKENS[:, :12]))
    assert padded == pytest.approx(cut, abs=1e-6)


def test_a_block_that_adds_nothing_has_no_influence_and_the_model_is_left_as_it_was() -> None:
    model = random_model("llama").train()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.1.{name}.weight").zero_()
    view = ModelView.of(model)
    first, second = block_influence(view, CalibrationSet.from_tokens(TOKENS)).values()
    assert second == pytest.approx(0, abs=1e-6)
    assert first > 0.05
    assert model.training
    assert not any(block.module._forward_hooks for block in view.blocks)


def test_the_first_broken_block_is_named() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"block model\.layers\.1 puts out NaN"):
        block_influence(ModelView.of(model), CalibrationSet.from_tokens(TOKENS))
