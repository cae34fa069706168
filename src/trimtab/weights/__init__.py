"""Floor 1: quantize, prune and factorise the linear layers. Read base.py first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.weights._compress import compress as compress
    from trimtab.weights.gptq import Gptq as Gptq
    from trimtab.weights.rtn import Rtn as Rtn


def __getattr__(name: str) -> Any:
    if name == "compress":
        return importlib.import_module("trimtab.weights._compress").compress
    exports = room_exports("weights")
    if name in exports:
        return getattr(importlib.import_module(exports[name]), name)
    raise AttributeError(f"module 'trimtab.weights' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(["compress", *room_exports("weights")])
