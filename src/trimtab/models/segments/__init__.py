"""The KV cache: exact windows and encoded history as segments, positions, transactions. Read plan.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.models.segments.cache import SegmentCache as SegmentCache
    from trimtab.models.segments.plan import CachePlan as CachePlan
    from trimtab.models.segments.plan import Codec as Codec
    from trimtab.models.segments.plan import HeadPlan as HeadPlan
    from trimtab.models.segments.plan import TensorPlan as TensorPlan
    from trimtab.models.segments.rope import RopeSource as RopeSource

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "SegmentCache": "cache",
        "CachePlan": "plan",
        "Codec": "plan",
        "HeadPlan": "plan",
        "TensorPlan": "plan",
        "RopeSource": "rope",
    },
)
