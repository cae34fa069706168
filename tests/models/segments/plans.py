"""Plans and caches that the tests of segments share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.random import random_model
from trimtab.models.segments import CachePlan, HeadPlan, SegmentCache, TensorPlan
from trimtab.models.views import ModelView
from trimtab.tensors.kv.codec import KVCodec

WITHOUT_ROPE = ("gpt2", "opt")
EXACT = KVCodec(bits=0)


def plan_for(model: PreTrainedModel, keys: TensorPlan, values: TensorPlan | None = None, **options: Any) -> CachePlan:
    """The same plan for all heads of all layers; `options` are those of HeadPlan."""
    heads = [tuple(range(block.attention.num_kv_heads)) for block in ModelView.of(model).blocks]
    return CachePlan(
        tuple((HeadPlan(heads=own, keys=keys, values=values or keys, **options),) for own in heads), name="test"
    )


def exact(model: PreTrainedModel, block: int = 16, *, pre_rope: bool = False) -> CachePlan:
    return plan_for(
        model, TensorPlan(codec=EXACT, block=block, pre_rope=pre_rope), TensorPlan(codec=EXACT, block=block)
    )


def kivi(model: PreTrainedModel, bits: int = 2, *, pre_rope: bool = False) -> CachePlan:
    """KIVI, with small groups and windows."""
    return plan_for(
        model,
        TensorPlan(codec=KVCodec(bits=bits, group_tokens=16), block=32, pre_rope=pre_rope),
        TensorPlan(codec=KVCodec(bits=bits, group_channels=8), window=32, block=32),
    )


def streaming(model: PreTrainedModel, sinks: int = 2, recent: int = 6) -> CachePlan:
    keep = TensorPlan(codec=EXACT, window=recent, block=1)
    return plan_for(model, keep, sinks=sinks, recent=recent, positions="cache")


def new_cache(model: PreTrainedModel, plan: str = "exact", **options: Any) -> SegmentCache:
    return SegmentCache(model, {"exact": exact, "kivi": kivi, "streaming": streaming}[plan](model, **options))


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(seed))


def eager_twin(family: str, **overrides: Any) -> PreTrainedModel:
    """The same random model, with transformers' plain attention."""
    model = random_model(family, **overrides)
    model.set_attn_implementation("eager")
    return model


def feed(model: PreTrainedModel, cache: SegmentCache, ids: Tensor, sizes: list[int], **more: Tensor) -> Tensor:
    """Logits [R, T, vocabulary] of ids, given to the model in chunks of these sizes."""
    parts, begin = [], cache.get_seq_length()
    mask, positions = more.get("attention_mask"), more.get("position_ids")
    place = 0
    for chunk in ids.split(sizes, dim=1):
        end = place + chunk.shape[1]
        own: dict[str, Any] = {}
        if mask is not None:
            own["attention_mask"] = mask[:, : begin + end]
        if positions is not None:
            own["position_ids"] = positions[:, place:end]
        parts.append(model(chunk, past_key_values=cache, **own).logits)
        place = end
    return torch.cat(parts, dim=1)


def content(cache: SegmentCache) -> list[tuple[Tensor, Tensor]]:
    """Dense keys and values of each layer and row, as attention sees them."""
    return [layer._dense(row) for layer in cache.segment_layers for row in range(layer.rows)]


def same(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
