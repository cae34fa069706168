"""What a KV cache method costs in quality, and what it really stores. Read decoding.py first.

decoding.py          reading a text through a cache, so that its error shows
divergence.py        next tokens against the uncompressed model
attention.py         error of keys, values and attention outputs with the model's own queries
recall.py            looking up what stands far back
bits.py              bits per element, from allocated buffers
measure.py           all of them for one method
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation.caches.attention import AttentionError as AttentionError
    from trimtab.evaluation.caches.attention import AttentionInputs as AttentionInputs
    from trimtab.evaluation.caches.attention import attention_error as attention_error
    from trimtab.evaluation.caches.attention import replay as replay
    from trimtab.evaluation.caches.bits import CacheBits as CacheBits
    from trimtab.evaluation.caches.bits import cache_bits as cache_bits
    from trimtab.evaluation.caches.decoding import chunked_logits as chunked_logits
    from trimtab.evaluation.caches.divergence import cache_divergence as cache_divergence
    from trimtab.evaluation.caches.measure import CacheReference as CacheReference
    from trimtab.evaluation.caches.measure import measure_cache as measure_cache
    from trimtab.evaluation.caches.recall import RecallSetting as RecallSetting
    from trimtab.evaluation.caches.recall import recall_by_distance as recall_by_distance

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AttentionError": "attention",
        "AttentionInputs": "attention",
        "CacheBits": "bits",
        "CacheReference": "measure",
        "RecallSetting": "recall",
        "attention_error": "attention",
        "cache_bits": "bits",
        "cache_divergence": "divergence",
        "chunked_logits": "decoding",
        "measure_cache": "measure",
        "recall_by_distance": "recall",
        "replay": "attention",
    },
)
