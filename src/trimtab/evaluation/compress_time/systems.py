"""The systems that `trimtab bench compress` knows, by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.evaluation.beside.base import System

_SYSTEMS = (
    System("trimtab/gptq-4", "sessions:TrimtabGptq"),
    System("llmcompressor/gptq-4", "sessions:LlmcompressorGptq", {}, {"llmcompressor": "llmcompressor"}),
    System("trimtab/loftq-4", "sessions:TrimtabLoftq"),
    System("peft/loftq-4", "sessions:PeftLoftq", {}, {"peft": "peft", "bitsandbytes": "bitsandbytes"}),
)


def choose(systems: Sequence[str] | None = None) -> list[System]:
    """The systems to measure, in the order of the table.

    systems   names, or libraries, which stand for all of theirs; None: all

    Raises ConfigError for a name that is none of these.
    """
    known = {*(system.name for system in _SYSTEMS), *(system.library for system in _SYSTEMS)}
    for name in systems or ():
        if name not in known:
            raise ConfigError(f"unknown system '{name}'. {did_you_mean(name, known)}")
    return [system for system in _SYSTEMS if systems is None or {system.name, system.library} & set(systems)]
