"""Floor 1: compress, evict and window the KV cache. Read base.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.cache._files import load as load
    from trimtab.cache._files import save as save
    from trimtab.cache._making import fit as fit
    from trimtab.cache._retrieval.detection import detect_heads as detect_heads
    from trimtab.cache._retrieval.picture import draw as draw
    from trimtab.cache._retrieval.scores import HeadScores as HeadScores
    from trimtab.cache.auto import Auto as Auto
    from trimtab.cache.cq import Cq as Cq
    from trimtab.cache.exact import Exact as Exact
    from trimtab.cache.gear import Gear as Gear
    from trimtab.cache.gear_l import GearL as GearL
    from trimtab.cache.kivi import Kivi as Kivi
    from trimtab.cache.kvquant import Kvquant as Kvquant
    from trimtab.cache.retrieval_heads import RetrievalHeads as RetrievalHeads
    from trimtab.cache.rotatekv import RotateKV as RotateKV
    from trimtab.cache.streaming import Streaming as Streaming

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "fit": "_making",
        "load": "_files",
        "save": "_files",
        "detect_heads": "_retrieval.detection",
        "draw": "_retrieval.picture",
        "HeadScores": "_retrieval.scores",
        **room_exports("cache"),
    },
)
