"""Every refusal: what it says, and that nothing has changed."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import CompositionError, ConfigError, DataError, TargetError
from trimtab.models.random import random_model
from trimtab.models.segments import CachePlan, HeadPlan, SegmentCache, TensorPlan
from trimtab.tensors.kv.codec import KVCodec

from .plans import EXACT, exact, feed, new_cache, plan_for, streaming, tokens


def test_plans_that_do_not_fit() -> None:
    model = random_model("llama")
    plan = exact(model)
    with pytest.raises(ConfigError, match="plans 1 layers; the model has 2"):
        SegmentCache(model, CachePlan(plan.layers[:1]))
    half = TensorPlan(codec=EXACT)
    with pytest.raises(ConfigError, match=r"layer 0: the plan holds KV heads \[0\], the layer has 2"):
        SegmentCache(model, CachePlan(((HeadPlan(heads=(0,), keys=half, values=half),),) * 2))
    wide = TensorPlan(codec=KVCodec(bits=2, group_channels=96), block=32)
    with pytest.raises(ConfigError, match="groups of 96 channels do not divide"):
        SegmentCache(model, plan_for(model, wide))
    with pytest.raises(ConfigError, match="window >= 0 and block >= 1"):
        TensorPlan(codec=EXACT, block=0)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_rotary_positions(family: str) -> None:
    model = random_model(family)
    for plan in (exact(model, pre_rope=True), streaming(model)):
        with pytest.raises(TargetError, match="has no rotary positions.*kivi or gear"):
            SegmentCache(model, plan)


def test_rotary_positions_that_move() -> None:
    moving = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = random_model("llama", rope_parameters=moving)
    with pytest.raises(TargetError, match="'dynamic'"):
        SegmentCache(model, exact(model, pre_rope=True))
    SegmentCache(model, exact(model))


def test_another_batch_size() -> None:
    model = random_model("llama")
    cache = new_cache(model)
    feed(model, cache, tokens(2, 9), [9])
    with pytest.raises(DataError, match="holds 2 rows, the new tokens are 3"):
        model(tokens(3, 1), past_key_values=cache)
    assert cache.get_seq_length() == 9
    assert cache.batch_size == 2


def test_texts_longer_than_the_positions() -> None:
    model = random_model("llama")
    cache = new_cache(model)
    feed(model, cache, tokens(1, 128), [127, 1])
    with pytest.raises(DataError, match="grown to 129 tokens.*positions for 128.*streaming"):
        model(tokens(1, 1), past_key_values=cache)
    assert [layer.length for layer in cache.segment_layers] == [128, 128]
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    longer = random_model("llama", rope_parameters=linear)
    cache = new_cache(longer)
    feed(longer, cache, tokens(1, 200), [200])
    with pytest.raises(DataError, match="positions for 256"):
        feed(longer, cache, tokens(1, 57), [57])


def test_padding_is_no_text() -> None:
    model = random_model("llama")
    cache, mask = new_cache(model), torch.ones((1, 150), dtype=torch.long)
    mask[:, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feed(model, cache, tokens(1, 150), [100, 50], attention_mask=mask, position_ids=positions)
    assert cache.segment_layers[0].lengths == [120]


@pytest.mark.parametrize("plan", ["exact", "streaming"])
def test_positions_that_jump(plan: str) -> None:
    model = random_model("llama")
    cache = new_cache(model, plan, pre_rope=True) if plan == "exact" else new_cache(model, plan)
    feed(model, cache, tokens(1, 10), [10])
    for positions in ([[11]], [[10, 12]], [[10, 10]], [[9]]):
        ids = tokens(1, len(positions[0]))
        with pytest.raises(DataError, match=r"row 0: position \d+ comes where \d+ should.*position_ids"):
            model(ids, past_key_values=cache, position_ids=torch.tensor(positions))
    assert [layer.length for layer in cache.segment_layers] == [10, 10]
    model(tokens(1, 1), past_key_values=cache)
    other = new_cache(model)  # keys that are rotated already may have any position
    feed(model, other, tokens(1, 10), [10])
    model(tokens(1, 1), past_key_values=other, position_ids=torch.tensor([[50]]))


def test_paths_whose_positions_jump() -> None:
    model = random_model("llama")
    cache = new_cache(model, pre_rope=True)
    feed(model, cache, tokens(1, 10), [10])
    cache.begin()
    model(tokens(1, 3), past_key_values=cache, position_ids=torch.tensor([[10, 11, 11]]))
    with pytest.raises(DataError, match="position 11 comes where 12 should"):
        cache.commit()
    assert cache.in_transaction
    cache.commit([[0, 2]])
    assert cache.get_seq_length() == 12


def test_transactions() -> None:
    model = random_model("llama")
    cache = new_cache(model)
    for call in (cache.commit, cache.rollback):
        with pytest.raises(CompositionError, match=r"no draft is open; call begin\(\)"):
            call()
    feed(model, cache, tokens(2, 10), [10])
    cache.begin()
    with pytest.raises(CompositionError, match="open already"):
        cache.begin()
    with pytest.raises(CompositionError, match=r"before fork\(\)"):
        cache.fork()
    with pytest.raises(CompositionError, match="instead of crop"):
        cache.crop(-1)
    feed(model, cache, tokens(2, 3), [3])
    with pytest.raises(DataError, match=r"path \[0, 3\] leaves the 3 drafted tokens, 0 to 2"):
        cache.commit(torch.tensor([0, 3]))
    with pytest.raises(DataError, match="paths for 1 rows; the cache holds 2"):
        cache.commit([[0]])
    cache.commit([[0], [0]])
    with pytest.raises(ConfigError, match="snapshot of its own"):
        cache.restore(new_cache(model))


def test_masks_of_another_width() -> None:
    model = random_model("llama")
    cache = new_cache(model)
    feed(model, cache, tokens(1, 10), [10])
    with pytest.raises(DataError, match="mask has 2 columns; 10 tokens of the cache and 2 new"):
        model(tokens(1, 2), past_key_values=cache, attention_mask=torch.ones((1, 1, 2, 2), dtype=torch.bool))


def test_dense_tensors_cannot_show_everything() -> None:
    model = random_model("llama")
    ragged, cut = new_cache(model), new_cache(model, "streaming")
    mask = torch.ones((2, 10), dtype=torch.long)
    mask[0, :4] = 0
    model(tokens(2, 10), past_key_values=ragged, attention_mask=mask)
    feed(model, cut, tokens(1, 20), [20])
    model.set_attn_implementation("sdpa")
    with pytest.raises(CompositionError, match="rows of this cache hold 6 to 10 of 10 tokens"):
        model(tokens(2, 1), past_key_values=ragged)
    with pytest.raises(CompositionError, match="hold different tokens.*'trimtab'"):
        model(tokens(1, 1), past_key_values=cut)


def test_a_model_that_is_gone() -> None:
    cache = new_cache(random_model("llama"))
    import gc

    gc.collect()
    with pytest.raises(CompositionError, match="no longer exists"):
        cache.model  # noqa: B018
