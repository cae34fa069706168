"""Unit maps: units partition what they own, removing one changes what it should, for every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import TargetError
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import BlockView, ModelView
from trimtab.weights._pruning.plan import Plan, PlanEntry
from trimtab.weights._pruning.units import (
    SliceUnits,
    UnitMap,
    elements,
    heads,
    layer,
    n_of_m,
    neurons,
    rotary_pairs,
    value_directions,
)

MAPS: dict[str, Callable[[BlockView], SliceUnits]] = {
    "neuron": neurons,
    "rotary_pair": rotary_pairs,
    "value_direction": value_directions,
    "head": heads,
    "layer": layer,
}
TOKENS = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(5))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def maps_of(family: str) -> list[tuple[ModelView, SliceUnits]]:
    view = ModelView.of(random_model(family))
    found = []
    for make in MAPS.values():
        attention = view.blocks[0].attention
        if make is not rotary_pairs or (attention.rotary and attention.q_norm is None):
            found.append((view, make(view.blocks[0])))
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_units_partition_the_entries_they_own(family: str) -> None:
    for view, units in maps_of(family):
        shapes = {linear.name: (linear.out_features, linear.in_features) for linear in view.linears}
        covered = {part.linear: torch.zeros(part.shape, dtype=torch.int64) for part in units.slices}
        sizes = []
        for unit in range(units.count):
            masks = units.masks(torch.arange(units.count) != unit)
            sizes.append(sum(int((~mask).sum()) for mask in masks.values()))
            for name, mask in masks.items():
                assert tuple(mask.shape) == shapes[name]
                covered[name] += ~mask
        assert max(int(times.max()) for times in covered.values()) == 1  # no entry is in two units
        assert units.sizes().tolist() == sizes
        assert min(sizes) > 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_of_entries_add_up_to_those_of_units(family: str) -> None:
    for view, units in maps_of(family):
        generator = torch.Generator().manual_seed(1)
        scores = {x.name: torch.rand(x.out_features, x.in_features, generator=generator) for x in view.linears}
        for how in ("sum", "mean", "max"):
            reduced = units.reduce(scores, how)  # type: ignore[arg-type]
            for unit in (0, units.count - 1):
                masks = units.masks(torch.arange(units.count) != unit)
                own = torch.cat([scores[name][~mask] for name, mask in masks.items()])
                assert float(reduced[unit]) == pytest.approx(float(getattr(own, how)()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "phi3", "gpt2", "opt"])
def test_a_removed_neuron_is_as_a_neuron_that_is_not_there(family: str) -> None:
    """Zeroed triples give the logits of an MLP whose activations at these neurons are zero, biases and all."""
    model, other = random_model(family), random_model(family)
    view = ModelView.of(model)
    units = neurons(view.blocks[0])
    keep = torch.arange(units.count) % 3 != 1
    Plan((PlanEntry.of(units, keep),)).zero(view.linears, [units])
    down = next(x for x in ModelView.of(other).blocks[0].linears if x.role == "down")
    down.module.register_forward_pre_hook(lambda module, args: (args[0] * keep,))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_biases_of_removed_rows_go_and_no_others(family: str) -> None:
    view = ModelView.of(random_model(family))
    for linear in view.linears:
        assert linear.bias is not None
        linear.bias.fill_(1.0)
    units = neurons(view.blocks[0])
    keep = torch.arange(units.count) % 3 != 1
    Plan((PlanEntry.of(units, keep),)).zero(view.linears, [units])
    for linear in view.linears:
        assert linear.bias is not None
        first = linear.role == "up" and linear.block == 0
        assert torch.equal(linear.bias, keep.float() if first else torch.ones_like(linear.bias))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_value_directions_and_heads_are_those_of_the_attention_output(family: str) -> None:
    """Zeroing them is zeroing these inputs of `o`, which hold head after head."""
    for make, per_head in ((value_directions, None), (heads, 1)):
        model, other = random_model(family), random_model(family)
        view = ModelView.of(model)
        attention = view.blocks[0].attention
        units = make(view.blocks[0])
        keep = torch.arange(units.count) != 1
        Plan((PlanEntry.of(units, keep),)).zero(view.linears, [units])
        kept = keep.view(attention.num_kv_heads, 1, per_head or attention.head_dim)
        shape = (attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.head_dim)
        mask = kept.expand(shape).reshape(-1)
        o = next(x for x in ModelView.of(other).blocks[0].linears if x.role == "o")
        o.module.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


def test_a_removed_rotary_pair_takes_its_energy_at_every_position() -> None:
    """With all pairs of a KV head but one removed, queries and keys live in that pair's plane, before and after
    rotation: rows p and p + rotary_dim / 2 of all heads of the group are what is left."""
    view = ModelView.of(random_model("llama"))
    attention = view.blocks[0].attention
    half, share = attention.rotary_dim // 2, attention.num_heads // attention.num_kv_heads
    units = rotary_pairs(view.blocks[0])
    keep = torch.zeros(units.count, dtype=torch.bool)
    keep[half + 2] = True  # pair 2 of KV head 1
    rows = {name.rpartition(".")[2]: index.tolist() for name, index in units.kept_indices(keep).items()}
    dim = attention.head_dim
    assert rows["k_proj"] == [dim + 2, dim + 2 + half]
    assert rows["q_proj"] == [h * dim + p for h in range(share, 2 * share) for p in (2, 2 + half)]


def test_parts_of_a_head_that_are_not_rotated_belong_to_no_pair() -> None:
    block = ModelView.of(random_model("gpt_neox")).blocks[0]
    units = rotary_pairs(block)
    (part,) = units.slices  # q and k are fused
    rotated = int((part.owners >= 0).sum())
    assert block.attention.rotary_dim < block.attention.head_dim
    assert rotated == 2 * block.attention.num_heads * block.attention.rotary_dim


def test_a_removed_layer_passes_its_input_on() -> None:
    model = random_model("qwen2")
    view = ModelView.of(model)
    units = layer(view.blocks[1])
    Plan((PlanEntry.of(units, torch.tensor([False])),)).zero(view.linears, [units])
    other = random_model("qwen2")
    ModelView.of(other).blocks[1].module.forward = lambda hidden, *args, **kwargs: hidden
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-6)


def test_units_that_a_model_has_not_are_named() -> None:
    with pytest.raises(TargetError, match="no rotary embedding"):
        rotary_pairs(ModelView.of(random_model("gpt2")).blocks[0])
    with pytest.raises(TargetError, match="normalised by head"):
        rotary_pairs(ModelView.of(random_model("qwen3")).blocks[0])
    linear = ModelView.of(random_model("llama")).linears[0]
    with pytest.raises(TargetError, match=r"q_proj \(role q\): 2:5 sparsity .* does not divide 48"):
        n_of_m(linear, 2, 5)


def test_single_entries() -> None:
    linear = ModelView.of(random_model("llama")).linears[0]
    units: UnitMap = elements(linear)
    keep = torch.rand(units.count) < 0.5
    assert torch.equal(units.masks(keep)[linear.name], keep.view(linear.out_features, linear.in_features))
    assert int(units.sizes().sum()) == units.count
    grouped = n_of_m(linear, 2, 4)
    grouped.masks(torch.tensor([1, 0, 1, 0]).bool().repeat(units.count // 4))
    with pytest.raises(TargetError, match="row 0 does not lose 2 of columns"):
        grouped.masks(torch.ones(units.count, dtype=torch.bool))
    with pytest.raises(TargetError, match=r"want bool \[2304\]"):
        units.masks(keep[1:])
