"""The allocator keeps its budget, spends it where errors fall, and refuses what nothing fits."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.cache import Auto
from trimtab.cache._making import layer_shapes
from trimtab.cache.base import CacheMethod
from trimtab.core.errors import BudgetError, ConfigError
from trimtab.models.segments import SegmentCache

from .conftest import divergence, feed, fitted, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
CONTEXT = 384


def cache_of(model: PreTrainedModel, bits: float) -> SegmentCache:
    return fitted(model, Auto(bits_per_element=bits, context=CONTEXT, window=0)).new(model)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


@pytest.mark.parametrize("bits", [4.0, 6.0, 9.0])
def test_the_budget_holds_at_its_context(model: PreTrainedModel, bits: float) -> None:
    """Counted from what is stored: runs, and the exact tokens in 16 bits, as the budget reckons them."""
    cache = cache_of(model, bits)
    feed(model, cache, tokens(1, CONTEXT), [CONTEXT])
    exact = encoded = 0
    for layer in cache.segment_layers:
        for group in layer.groups:
            for side in group.sides:
                exact += len(group.plan.heads) * 32 * (side.window_tokens(0) + 4)
                encoded += sum(t.nbytes for run in side.runs[0] if run.bits for t in run.tensors().values())
    shared = sum(t.numel() * t.element_size() for t in tables(cache))
    assert (encoded - shared) * 8 + 16 * exact <= bits * 2 * 2 * 64 * CONTEXT * 1.02


def tables(cache: SegmentCache) -> list[torch.Tensor]:
    """What runs share with each other: once for each run, as `encoded` counts them."""
    return [
        t
        for layer in cache.segment_layers
        for group in layer.groups
        for side in group.sides
        for run in side.runs[0]
        for name, t in run.tensors().items()
        if name == "levels" or (name in ("scale", "minimum") and side.plan.codec.scale is not None)  # type: ignore[attr-defined]
    ]


def test_more_bits_mean_less_error(model: PreTrainedModel) -> None:
    ids = tokens(2, 300)
    wanted = model(ids, use_cache=False).logits[:, 256:]
    found = [
        divergence(wanted, feed(model, cache_of(model, bits), ids, [256, 44])[:, 256:]) for bits in (4.0, 6.0, 9.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[-1]


def test_all_heads_are_kept_once_and_equal_choices_together(model: PreTrainedModel) -> None:
    for groups in cache_of(model, 5.0).plan.layers:
        assert sorted(head for group in groups for head in group.heads) == [0, 1]
        assert len(groups) <= 2


def test_a_budget_below_the_smallest_choice_is_refused_with_it(model: PreTrainedModel) -> None:
    with pytest.raises(BudgetError, match=r"auto: no choice keeps 1.5 bits .*the smallest takes") as refusal:
        cache_of(model, 1.5)
    least = float(re.search(r"takes (\d+\.\d+)", str(refusal.value)).group(1))  # type: ignore[union-attr]
    assert cache_of(model, least + 0.01).plan.name == "auto"


def test_one_layer_cannot_be_planned_alone(model: PreTrainedModel) -> None:
    method: CacheMethod = Auto()
    with pytest.raises(ConfigError, match=r"use plans\(\)"):
        method.head_plans(layer_shapes(model)[0], {})
