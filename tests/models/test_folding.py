"""Folding a scale into norms and linears leaves the function as it was, for every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import NumericsError, TargetError
from trimtab.models.folding import Fold, NormFold, RowFold, fold_of
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import BlockView, ModelView

TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))
Find = Callable[[ModelView, BlockView, str], Fold | str]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases of a new model are ones and zeros, which hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def everywhere(view: ModelView, block: BlockView, site: str) -> Fold | str:
    return fold_of(view, block, site, {linear.name for linear in view.linears})


@torch.no_grad()
def fold_all(model: PreTrainedModel, find: Find = everywhere) -> list[str]:
    """Random scales in front of every site that allows it; the reasons of the others."""
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(1)
    reasons = []
    for block in view.blocks:
        for site, linears in block.sites.items():
            fold = find(view, block, site)
            if isinstance(fold, str):
                reasons.append(f"{site}: {fold}")
                continue
            scale = torch.rand(linears[0].in_features, generator=generator) * 3 + 0.2
            stored = fold.stored(scale)
            for name, values in fold.divided(scale).items():
                parameter = model.get_parameter(name)
                assert values.dtype == parameter.dtype
                parameter.copy_(values)
            for linear in fold.consumers:
                linear.set_weight(linear.weight * stored.to(linear.weight.dtype))
    return reasons


def change(model: PreTrainedModel, find: Find = everywhere) -> float:
    before = logits(model)
    fold_all(model, find)
    return float((logits(model) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_folded_model_computes_the_same(family: str) -> None:
    model = uneven(random_model(family))
    before = [p.clone() for p in model.parameters()]
    assert change(model) < 1e-5
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) >= 2 * 4


@pytest.mark.parametrize(
    ("family", "heads", "sites"),
    [
        ("llama", 4, {"attention_in", "attention_out", "mlp_in", "mlp_out"}),
        ("llama", 2, {"attention_in", "mlp_in", "mlp_out"}),
        ("gpt2", None, {"attention_in", "attention_out", "mlp_in"}),
        ("gpt_neox", None, {"attention_in", "attention_out", "mlp_in"}),
    ],
)
def test_which_sites_can_be_folded(family: str, heads: int | None, sites: set[str]) -> None:
    model = uneven(random_model(family, **({} if heads is None else {"num_key_value_heads": heads})))
    view = ModelView.of(model)
    found = {
        site.split(".")[-1] for site in view.blocks[0].sites if isinstance(everywhere(view, view.blocks[0], site), Fold)
    }
    assert found == sites
    assert change(model) < 1e-5


def without_offset(view: ModelView, block: BlockView, site: str) -> Fold | str:
    fold = everywhere(view, block, site)
    return NormFold(fold.consumers, fold.norm, fold.name, 0.0) if isinstance(fold, NormFold) else fold


def without_a_reader(view: ModelView, block: BlockView, site: str) -> Fold | str:
    fold = everywhere(view, block, site)
    return NormFold(fold.consumers[1:], fold.norm, fold.name, fold.offset) if isinstance(fold, NormFold) else fold


def of_the_first_rows(view: ModelView, block: BlockView, site: str) -> Fold | str:
    fold = everywhere(view, block, site)
    if not isinstance(fold, RowFold) or not fold.linear.rows:
        return fold
    return RowFold(fold.consumers, fold.linear, slice(0, fold.consumers[0].in_features))


@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("gemma2", without_offset),
        ("llama", without_a_reader),
        ("phi3", of_the_first_rows),
        ("gpt_neox", of_the_first_rows),
    ],
)
def test_the_check_notices_a_broken_fold(family: str, broken: Find) -> None:
    assert change(uneven(random_model(family)), broken) > 1e-3


def test_consumers_are_scaled_by_what_the_norm_could_store() -> None:
    """In bfloat16 a gain rounds by up to 2^-9, and the columns must follow."""
    model = uneven(random_model("gemma2", dtype=torch.bfloat16))
    view = ModelView.of(model)
    fold = everywhere(view, view.blocks[0], "layers.0.mlp_in")
    assert isinstance(fold, NormFold)
    scale = torch.rand(48, generator=torch.Generator().manual_seed(3)) + 0.3
    (name,) = fold.divided(scale)
    assert name == "model.layers.0.pre_feedforward_layernorm.weight"
    gain = fold.divided(scale)[name].float() + 1
    torch.testing.assert_close(gain * fold.stored(scale), fold.gain)
    assert not torch.allclose(gain * scale, fold.gain)


def test_a_norm_with_a_reader_that_stays_is_refused_in_words() -> None:
    view = ModelView.of(random_model("llama"))
    block = view.blocks[0]
    assert fold_of(view, block, "layers.0.attention_in", {"model.layers.0.self_attn.q_proj"}) == (
        "model.layers.0.input_layernorm is also read by model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, which must stay as it is"
    )
    assert fold_of(view, block, "layers.0.mlp_out", {"model.layers.0.mlp.down_proj"}) == (
        "model.layers.0.mlp.up_proj must stay as it is"
    )
    assert everywhere(view, block, "layers.0.attention_out") == "4 query heads share 2 value heads"
    with pytest.raises(TargetError, match=r"no site 'layers.7.mlp_in'. Sites: layers.0.attention_in"):
        everywhere(view, block, "layers.7.mlp_in")


def test_a_gain_that_overflows_is_an_error() -> None:
    view = ModelView.of(random_model("llama", dtype=torch.float16))
    fold = everywhere(view, view.blocks[0], "layers.0.mlp_in")
    assert isinstance(fold, NormFold)
    with pytest.raises(NumericsError, match=r"post_attention_layernorm.weight: .* torch.float16 cannot hold"):
        fold.divided(torch.full((48,), 1e-6))
