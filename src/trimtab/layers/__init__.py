"""Floor 1: change what a layer computes. Read base.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.layers._convert import convert as convert
    from trimtab.layers._convert import convert_to as convert_to
    from trimtab.layers.rsparse import RSparse as RSparse
    from trimtab.tensors.sparse_inputs import every_token_sparse as every_token_sparse

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "convert": "_convert",
        "convert_to": "_convert",
        "every_token_sparse": "_convert",
        **room_exports("layers"),
    },
)
