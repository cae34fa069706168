"""Floor 1: draft, verify and choose tokens, exactly. Read base.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.decoding._decoder import Decoder as Decoder
    from trimtab.decoding._ledger import DecodingLedger as DecodingLedger
    from trimtab.decoding._loop import Generation as Generation
    from trimtab.decoding._sampling import Sampling as Sampling
    from trimtab.decoding.dola import Dola as Dola
    from trimtab.decoding.eft import Eft as Eft
    from trimtab.decoding.metric_aware import MetricAware as MetricAware
    from trimtab.decoding.rsd_c import RsdC as RsdC
    from trimtab.decoding.rsd_s import RsdS as RsdS
    from trimtab.decoding.spectr import Spectr as Spectr
    from trimtab.decoding.speculative import Speculative as Speculative
    from trimtab.decoding.weak_to_strong import WeakToStrong as WeakToStrong

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Decoder": "_decoder",
        "DecodingLedger": "_ledger",
        "Generation": "_loop",
        "Sampling": "_sampling",
        **room_exports("decoding"),
    },
)
