"""Floor 3: whether each published system does what its paper says, measured here. Read base.py first.

One file per system, named as its method. Names are imported on first use, so that listing needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.claims._run import claim_names as claim_names
    from trimtab.claims._run import claims_of as claims_of
    from trimtab.claims._run import run_claims as run_claims

_LAZY = ("claim_names", "claims_of", "run_claims")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("trimtab.claims._run"), name)
    raise AttributeError(f"module 'trimtab.claims' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
