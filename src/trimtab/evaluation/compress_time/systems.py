"""The systems that `trimtab bench compress` knows, by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.evaluation.beside.base import System, named

_LLMC = {"llmcompressor": "llmcompressor"}
_SYSTEMS = (
    System("trimtab/gptq-4", "sessions:TrimtabGptq"),
    System("llmcompressor/gptq-4", "sessions:LlmcompressorGptq", {}, _LLMC),
    System("trimtab/loftq-4", "sessions:TrimtabLoftq"),
    System("peft/loftq-4", "sessions:PeftLoftq", {}, {"peft": "peft", "bitsandbytes": "bitsandbytes"}),
    System("trimtab/sparsegpt-50", "sessions:TrimtabPruning", {"method": "sparsegpt"}),
    System("llmcompressor/sparsegpt-50", "sessions:LlmcompressorPruning", {"modifier": "SparseGPTModifier"}, _LLMC),
    System("trimtab/wanda-50", "sessions:TrimtabPruning", {"method": "wanda"}),
    System("llmcompressor/wanda-50", "sessions:LlmcompressorPruning", {"modifier": "WandaPruningModifier"}, _LLMC),
)


def choose(systems: Sequence[str] | None = None) -> list[System]:
    """The systems to measure, in the order of the table.

    systems   names, or libraries, which stand for all of theirs; None: all

    Raises ConfigError for a name that is none of these.
    """
    return named(_SYSTEMS, systems)
