"""GEAR and GEAR-L through the cache: what they are without their additions, and blocks with factors of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import Gear, GearL, Kivi
from trimtab.cache.base import CacheMethod
from trimtab.kernels.kv_attention import Run
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.segments import SegmentCache
from trimtab.models.segments.group import Group
from trimtab.tensors.kv.codec import KVCodec

from .conftest import divergence, feed, held, keys_and_values, same, store, tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
SIZE: dict[str, Any] = {"bits": 2, "group_size": 16}
NO_RANK = {"rank_keys": 0, "rank_values": 0, "prefill_rank_keys": 0, "prefill_rank_values": 0}
NO_OUTLIERS = {"outliers_keys": 0.0, "outliers_values": 0.0}
SIZES = [100, 1, 40, 1, 1, 49]


def stored(method: CacheMethod, sizes: list[int] = SIZES) -> SegmentCache:
    (keys, values), cache = keys_and_values(), method.new(tiny())
    store(cache, keys[:2, :, : sum(sizes)], values[:2, :, : sum(sizes)], sizes)
    return cache


def encoded(cache: SegmentCache, tokens: int) -> list[Tensor]:
    return [x[:, :tokens] for row in range(2) for x in held(cache, row)]


def runs(cache: SegmentCache, row: int = 0) -> list[Run]:
    return [run for side in cache.segment_layers[0].groups[0].sides for run in side.runs[row]]


# Blocks


def test_blocks_after_the_prompt_do_not_depend_on_how_many_tokens_come_at_once() -> None:
    at_once = stored(Gear(**SIZE, buffer=32, outliers_keys=0.1), [40, 120])
    singly = stored(Gear(**SIZE, buffer=32, outliers_keys=0.1), [40, *[1] * 120])
    assert [run.tokens for run in runs(at_once)] == [run.tokens for run in runs(singly)]
    assert same(encoded(at_once, 160), encoded(singly, 160))


def test_the_comparison_notices_blocks_that_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    singly = encoded(stored(Gear(**SIZE, buffer=32), [40, *[1] * 120]), 160)
    monkeypatch.setattr(KVCodec, "cut_anywhere", True)
    assert not same(encoded(stored(Gear(**SIZE, buffer=32), [40, 120]), 160), singly)


# (5) without outliers and rank


def test_without_rank_and_outliers_it_is_kivi_bit_for_bit() -> None:
    """What both have encoded: values leave KIVI's window later."""
    kivi = encoded(stored(Kivi(**SIZE, window=32)), 160)
    assert same(encoded(stored(Gear(**SIZE, buffer=32, **NO_RANK, **NO_OUTLIERS)), 160), kivi)
    assert same(encoded(stored(GearL(**SIZE, buffer=32, **NO_RANK)), 160), kivi)


@pytest.mark.parametrize(
    "more", [{"rank_keys": 1}, {"prefill_rank_values": 1}, {"outliers_values": 0.1}, {"outliers_keys": 0.1}], ids=str
)
def test_the_comparison_notices_each_addition(more: dict[str, Any]) -> None:
    kivi = encoded(stored(Kivi(**SIZE, window=32)), 160)
    assert not same(encoded(stored(Gear(**SIZE, buffer=32, **{**NO_RANK, **NO_OUTLIERS, **more})), 160), kivi)


def test_gear_l_is_gear_without_outliers() -> None:
    assert same(held(stored(GearL(**SIZE, buffer=32))), held(stored(Gear(**SIZE, buffer=32, **NO_OUTLIERS))))


def test_kcvt_has_one_group_for_each_channel_of_a_block_and_each_token() -> None:
    run = stored(GearL(bits=4, backbone="kcvt", buffer=32), [100]).segment_layers[0].groups[0]
    (keys,), (values,) = run.keys.runs[0], run.values.runs[0]
    assert keys.scale is not None
    assert values.scale is not None
    assert list(keys.scale.shape) == [2, 1, 32]
    assert list(values.scale.shape) == [1, 96]


# (6) blocks


def blocks_stay(method: CacheMethod) -> bool:
    """Whether factors and codes of 100 tokens are there, unchanged, after 92 more."""
    (keys, values), cache = keys_and_values(), method.new(tiny())
    store(cache, keys[:2, :, :100], values[:2, :, :100], [100])
    before = runs(cache)
    tensors = [{name: t.clone() for name, t in run.tensors().items()} for run in before]
    layer = cache.segment_layers[0]
    for begin, end in [(100, 101), (101, 150), (150, 192)]:
        k, _ = layer.update(keys[:2, :, begin:end], values[:2, :, begin:end])
        layer.attend(k.repeat_interleave(2, 1), None, None, 1.0, None, None)
    after = runs(cache)
    return all(
        any(run is other for other in after) and all(torch.equal(run.tensors()[name], t) for name, t in own.items())
        for run, own in zip(before, tensors, strict=True)
    )


def test_old_factors_never_change() -> None:
    assert blocks_stay(Gear(**SIZE, buffer=32))


def test_the_check_of_blocks_notices_a_past_that_is_compressed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official streaming path: every full buffer recompresses all of the past."""
    settle = Group.settle

    def again(self: Group, *args: Any, **more: Any) -> None:
        settle(self, *args, **more)
        for side in self.sides:
            for row in range(side.rows):
                if len(side.runs[row]) > 1:
                    whole = torch.cat([decode(run) for run in side.runs[row]], dim=1)
                    side.runs[row] = list(side.plan.codec.encode(whole[None], prefill=True))

    monkeypatch.setattr(Group, "settle", again)
    assert not blocks_stay(Gear(**SIZE, buffer=32))


def test_a_prompt_has_another_rank_than_what_is_generated() -> None:
    method = GearL(**SIZE, buffer=32, rank_keys=1, rank_values=2, prefill_rank_keys=3, prefill_rank_values=5)
    cache = stored(method, [100, 1, 30, 30, 1, 30])
    group = cache.segment_layers[0].groups[0]
    assert [(run.tokens, run.rank) for run in group.keys.runs[0]] == [(96, 3), (32, 1), (32, 1), (32, 1)]
    assert [(run.tokens, run.rank) for run in group.values.runs[0]] == [(96, 5), (32, 2), (32, 2), (32, 2)]


def test_how_generated_tokens_come_does_not_matter() -> None:
    """One by one or several at a time, each block of the buffer's length is encoded on its own."""
    steps = stored(Gear(**SIZE, buffer=32), [100, *[1] * 60])
    assert same(held(steps), held(stored(Gear(**SIZE, buffer=32), [100, 3, 20, 30, 7])))


def test_rows_have_factors_of_their_own() -> None:
    """The official code projects every row of the batch as the first one."""
    (keys, values), method = keys_and_values(), GearL(**SIZE, buffer=32)
    batch, alone = method.new(tiny()), method.new(tiny())
    store(batch, keys, values, [200])
    store(alone, keys[2:], values[2:], [200])
    assert same(held(batch, 2), held(alone))


# What the additions are for


def test_low_rank_and_outliers_bring_predictions_nearer(mini: PreTrainedModel, prose: Tensor) -> None:
    """On a trained model at 2 bits, each addition to the same backbone."""
    ids = prose[:2, :300]
    wanted = mini(ids, use_cache=False).logits[:, 256:]
    found = {}
    for name, method in {
        "backbone": GearL(bits=2, **NO_RANK),
        "gear_l": GearL(bits=2),
        "gear": Gear(bits=2),
    }.items():
        found[name] = divergence(wanted, feed(mini, method.new(mini), ids, [256, 22, 22])[:, 256:])
    assert found["gear"] < found["gear_l"] < found["backbone"]


def test_outliers_of_a_short_vector_are_none() -> None:
    """2 % of 32 tokens of a channel is less than one at each end; of a prompt of 100 and more there are some."""
    cache = stored(Gear(**SIZE, buffer=32), [128, 1, 31, 32])
    counts = [run.outlier_values for run in cache.segment_layers[0].groups[0].keys.runs[0]]
    assert [0 if c is None else len(c) for c in counts] == [2 * 32 * 2, 0, 0]


def test_options_reach_the_codec() -> None:
    (plan,) = tiny_plan(Gear(bits=4, group_size=32, buffer=64, iterations=7, outliers_keys=0.2, outliers_values=0.3))
    assert isinstance(plan.keys.codec, KVCodec)
    assert isinstance(plan.values.codec, KVCodec)
    keys, values = plan.keys.codec, plan.values.codec
    assert (keys.bits, keys.group_tokens, keys.group_channels, keys.iterations) == (4, 32, 0, 7)
    assert (values.bits, values.group_tokens, values.group_channels, values.iterations) == (4, 0, 32, 7)
    assert keys.outliers is not None
    assert values.outliers is not None
    assert (keys.outliers.along, keys.outliers.fraction) == ("tokens", 0.2)
    assert (values.outliers.along, values.outliers.fraction) == ("channels", 0.3)
    assert plan.keys.block == plan.values.block == 64


def tiny_plan(method: CacheMethod) -> Any:
    return method.new(tiny()).plan.layers[0]
