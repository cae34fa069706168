"""KIVI through the cache: when tokens leave the window, that history never changes, and that keys go by channel."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import Kivi
from trimtab.cache._making import layer_shapes
from trimtab.evaluation.outliers import inject_outliers
from trimtab.kernels.kv_attention import Run
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.segments import CachePlan, SegmentCache, TensorPlan
from trimtab.models.segments.group import Group
from trimtab.tensors.kv.codec import KVCodec

from .conftest import divergence, feed, held, keys_and_values, store, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
KIVI = Kivi(bits=2, group_size=16, window=32)


def runs(cache: SegmentCache) -> list[Run]:
    return [
        run
        for layer in cache.segment_layers
        for group in layer.groups
        for side in group.sides
        for rows in side.runs
        for run in rows
    ]


def history_stays(method: Any) -> bool:
    """Whether what is encoded of 100 tokens is still there, unchanged, after 100 more."""
    model = tiny()
    cache = method.new(model)
    feed(model, cache, tokens(2, 100), [90, 1, 9])
    before, dense = runs(cache), [x.clone() for x in held(cache)]
    tensors = [{name: t.clone() for name, t in run.tensors().items()} for run in before]
    feed(model, cache, tokens(2, 100, seed=2), [1, 1, 35, 63])
    after = {id(run) for run in runs(cache)}
    encoded = 64  # keys and values alike
    return (
        all(id(run) in after for run in before)
        and all(
            torch.equal(run.tensors()[name], t)
            for run, own in zip(before, tensors, strict=True)
            for name, t in own.items()
        )
        and all(torch.equal(a[:, :encoded], b[:, :encoded]) for a, b in zip(dense, held(cache), strict=True))
    )


def requantize_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant, the way of transformers' QuantizedCache: each time, all history is decoded and encoded anew."""
    settle = Group.settle

    def again(self: Group, *args: Any, **more: Any) -> None:
        settle(self, *args, **more)
        for side in self.sides:
            for row in range(side.rows):
                if len(side.runs[row]) > 1:
                    whole = torch.cat([decode(run) for run in side.runs[row]], dim=1)
                    side.runs[row] = list(side.plan.codec.encode(whole[None]))

    monkeypatch.setattr(Group, "settle", again)


def test_codes_of_old_tokens_never_change() -> None:
    assert history_stays(KIVI)


def test_the_check_of_history_notices_codes_that_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    requantize_history(monkeypatch)
    assert not history_stays(KIVI)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 96, 130])
def test_who_leaves_the_window_when(length: int) -> None:
    """Keys in blocks of `window` from the beginning, so n mod R are exact; values oldest first, R to R + 31 are."""
    (keys, values), cache = keys_and_values(), KIVI.new(tiny())
    store(
        cache,
        keys[:, :, : length + 1],
        values[:, :, : length + 1],
        [length + 1] if length < 2 else [length // 2, length + 1 - length // 2],
    )
    group, n = cache.segment_layers[0].groups[0], length + 1
    assert group.keys.encoded[0] == n // 32 * 32
    assert group.values.encoded[0] == max(0, n - 32) // 32 * 32
    assert torch.equal(group.keys.window(0), keys[0, :, n // 32 * 32 : n])
    assert torch.equal(group.values.window(0), values[0, :, group.values.encoded[0] : n])


def test_codes_are_those_of_the_paper() -> None:
    """Keys: each 16 tokens of a channel on their own; values: each 16 channels of a token."""
    (keys, values), cache = keys_and_values(), KIVI.new(tiny())
    store(cache, keys[:1, :, :150], values[:1, :, :150], [70, 1, 79])
    found_keys, found_values = held(cache)

    def quantized(x: Tensor) -> Tensor:
        """x [..., 16]"""
        low = x.amin(-1, keepdim=True)
        step = ((x.amax(-1, keepdim=True) - low.half().float()) / 3).half().float()
        return ((x - low.half().float()) / step).round().clamp(0, 3) * step + low.half().float()

    wanted = quantized(keys[0, :, :128].transpose(1, 2).unflatten(2, (-1, 16))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found_keys[:, :128], wanted)
    wanted = quantized(values[0, :, :96].unflatten(2, (-1, 16))).flatten(2)
    torch.testing.assert_close(found_values[:, :96], wanted)


class ByToken(Kivi):
    """A broken variant: keys in groups of channels of a token, as values."""

    def head_plans(self, layer: Any, fitted: Any) -> Any:
        (plan,) = super().head_plans(layer, fitted)
        codec = KVCodec(bits=self.bits, group_channels=self.group_size)
        keys = TensorPlan(codec=codec, window=plan.keys.window, block=plan.keys.block)
        return (dataclasses.replace(plan, keys=keys),)


def cost(model: PreTrainedModel, ids: Tensor, kind: type[Kivi]) -> tuple[float, int]:
    """Divergence and bytes."""
    method = kind(bits=4, group_size=32, window=32)
    plan = CachePlan(tuple(method.plans(layer_shapes(model), {})), name="kivi")
    cache = SegmentCache(model, plan)
    found = feed(model, cache, ids, [200, *[8] * 4])
    return divergence(model(ids, use_cache=False).logits[:, 200:], found[:, 200:]), cache.nbytes()


def test_keys_with_outlier_channels_need_groups_of_tokens(mini: PreTrainedModel, prose: Tensor) -> None:
    """At equal bytes, on a trained model that was given the outlier channels of large ones."""
    model = copy.deepcopy(mini)
    inject_outliers(model, scale=16.0, channels=8)
    ids = prose[:2, :232]
    by_channel, bytes_by_channel = cost(model, ids, Kivi)
    by_token, bytes_by_token = cost(model, ids, ByToken)
    assert bytes_by_channel == bytes_by_token
    assert by_channel < 0.5 * by_token
