"""Keep every key and value as it is, and read them at the speed of memory.

Paper: Tri Dao, Daniel Haziza, Francisco Massa, Grigory Sizov, "Flash-Decoding for long-context inference", Stanford
CRFM blog, 2023.

The baseline that every other cache is measured against: nothing is lost. Attention to a long history is split over
tokens, each part computes its scores, their maximum, sum and weighted values, and the parts are merged by their
log-sum-exp; query heads that share a KV head share each read. The paper does so on GPUs; here it is the CPU kernel
too. History is stored in blocks that never move, so a step copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec

__all__ = ["Exact"]

BLOCK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Exact(CacheMethod):
    """No options: keys and values stay in the model's dtype."""

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        plan = TensorPlan(codec=KVCodec(bits=0), block=BLOCK_TOKENS)
        return (HeadPlan(heads=layer.all_heads, keys=plan, values=plan),)
