"""Speed of decoding methods beside plain decoding and transformers' assisted generation: `trimtab bench decoding`."""

from __future__ import annotations

from trimtab.core.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, {"Setting": "measure", "choose": "systems", "run": "_run"})
