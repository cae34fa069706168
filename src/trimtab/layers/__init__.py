"""Floor 1: change what a layer computes. Read base.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.layers.rsparse import RSparse as RSparse

__getattr__, __dir__ = lazy_exports(__name__, room_exports("layers"))
