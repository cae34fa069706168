"""llmcompressor's pruning and ours on one model, with the same text, at 50 % and 2 of every 4.

Run where it is installed. It leaves zeros in dense weights, which are measured as ours are: KL to the original on
held-out prose. Its files keep the zeros unless an own format is asked for, so its weights count as dense in bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimtab.evaluation.weight_decode.quantizing import HEAD, llmcompressor_oneshot
from trimtab.evaluation.weights_peers import each_alone, figures, ours
from trimtab.models.calibration_set import CalibrationSet

PATTERNS = ("0.5", "2:4")

Prune = Callable[[PreTrainedModel, CalibrationSet, str], float]
"""Prunes the linears of the blocks in place: (model, text, sparsity) -> stored bits per weight, everything."""


def _llmcompressor(modifier: str) -> Prune:
    def run(model: PreTrainedModel, text: CalibrationSet, sparsity: str) -> float:
        llmcompressor_pruning(model, text.tokens, modifier=modifier, sparsity=sparsity)
        return 16.0

    return run


def llmcompressor_pruning(model: PreTrainedModel, tokens: Tensor, *, modifier: str, sparsity: str) -> None:
    """A modifier of llmcompressor with its defaults, block after block; leaves zeros in dense weights.

    modifier   "SparseGPTModifier" or "WandaPruningModifier"
    sparsity   "0.5", or a pattern such as "2:4"
    """
    pruning: Any = importlib.import_module("llmcompressor.modifiers.pruning")
    amount = {"sparsity": 0.5, "mask_structure": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
    llmcompressor_oneshot(model, tokens, getattr(pruning, modifier)(**amount, ignore=[f"re:.*{HEAD}"]))


SYSTEMS: dict[str, tuple[str, Prune]] = {
    "trimtab/sparsegpt": ("trimtab", ours("sparsegpt", "sparsity", value_dtype="bfloat16")),
    "trimtab/wanda": ("trimtab", ours("wanda", "sparsity", value_dtype="bfloat16")),
    "trimtab/wanda + obs": ("trimtab", ours("wanda", "sparsity", value_dtype="bfloat16", repair="obs")),
    "llmcompressor/sparsegpt": ("llmcompressor", _llmcompressor("SparseGPTModifier")),
    "llmcompressor/wanda": ("llmcompressor", _llmcompressor("WandaPruningModifier")),
}


def measure(model: str = "ref", sparsities: Sequence[str] = PATTERNS, processes: int = 2) -> Iterator[dict[str, Any]]:
    """One entry for each system and sparsity: KL, seconds, peak memory, or the error that stopped it.

    processes   systems measured at a time, each with one thread
    """
    jobs = [(model, system, sparsity) for sparsity in sparsities for system in SYSTEMS]
    yield from each_alone(_entry, jobs, processes)


def _entry(model: str, system: str, sparsity: str) -> dict[str, Any]:
    package, prune = SYSTEMS[system]
    return {"system": system, "sparsity": sparsity, **figures(model, package, prune, sparsity)}
