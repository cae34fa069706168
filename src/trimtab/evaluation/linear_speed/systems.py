"""The systems that `trimtab bench linear` knows: those of `weight_decode` that have a linear layer to call alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimtab.evaluation import weight_decode
from trimtab.evaluation.beside.base import System

_OPENERS = {"trimtab_session:open_trimtab": "makers:trimtab_maker", "peer_sessions:open_peer": "makers:peer_maker"}


def choose(systems: Sequence[str] | None = None) -> list[System]:
    """The systems to measure, in the order of the table; names as in `weight_decode.choose`, None: all.

    A system without such a layer (llama.cpp's, our uncompressed model) is left out where it was not named. Raises
    ConfigError for unknown names.
    """
    chosen = weight_decode.choose(systems)
    return [
        replace(system, opener=_OPENERS[system.opener]) if _has_layer(system) else _whole_models_only(system)
        for system in chosen
        if systems is not None or _has_layer(system)
    ]


def _has_layer(system: System) -> bool:
    return system.opener in _OPENERS and system.options.get("method", "") is not None


def _whole_models_only(system: System) -> System:
    return replace(system, opener="makers:whole_models_only", options={"name": system.name})
