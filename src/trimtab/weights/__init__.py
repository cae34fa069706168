"""Floor 1: quantize, prune and factorise the linear layers. Read base.py first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.weights._compress import compress as compress
    from trimtab.weights._compress import compress_to as compress_to
    from trimtab.weights.gptq import Gptq as Gptq
    from trimtab.weights.rtn import Rtn as Rtn

_FUNCTIONS = ("compress", "compress_to")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("trimtab.weights._compress"), name)
    exports = room_exports("weights")
    if name in exports:
        return getattr(importlib.import_module(exports[name]), name)
    raise AttributeError(f"module 'trimtab.weights' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_FUNCTIONS, *room_exports("weights")])
