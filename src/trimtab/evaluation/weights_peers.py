"""Other libraries' quantizers and ours on one model, with the same text and codes of 2 and 3 bits, in groups of 64.

Run where the other libraries are installed. Each leaves rounded dense weights behind, which are measured as ours are:
KL to the original on held-out prose. Bits per weight are those of the files that each library writes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.evaluation.beside.child import memory
from trimtab.evaluation.kl import NextTokens, divergence
from trimtab.evaluation.weight_decode.quantizing import llmcompressor_gptq
from trimtab.models import ledger_of, load, tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import ModelView

GROUP = 64
SEQUENCES, LENGTH = 32, 256
WINDOWS = 24

Quantize = Callable[[PreTrainedModel, CalibrationSet, int], float]
"""Rounds the linears of the blocks in place: (model, text, bits of codes) -> stored bits per weight, everything."""


def llmcompressor(model: PreTrainedModel, text: CalibrationSet, bits: int) -> float:
    """GPTQ of llmcompressor with its defaults, asymmetric groups."""
    llmcompressor_gptq(model, text.tokens, bits=bits, group_size=GROUP, symmetric=False)
    return _packed(bits)


def auto_round(model: PreTrainedModel, text: CalibrationSet, bits: int) -> float:
    """auto-round with its default 200 steps per block, asymmetric groups."""
    module: Any = importlib.import_module("auto_round")
    rows: Any = [{"input_ids": row} for row in text.tokens]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=8)
    tuner = module.AutoRound(
        model,
        tokenizer_of(model),
        scheme={"bits": bits, "group_size": GROUP, "sym": False, "data_type": "int", "act_bits": 16},
        dataset=loader,
        seqlen=text.length,
        nsamples=len(text.tokens),
        device_map="cpu",
        enable_torch_compile=False,
    )
    tuner.quantize()
    return _packed(bits)


def _packed(bits: int) -> float:
    """A 16-bit scale for each group, and a zero point packed like the codes."""
    return bits + (16 + bits) / GROUP


def hqq(model: PreTrainedModel, text: CalibrationSet, bits: int) -> float:
    """hqq with its defaults: no text, zero points are numbers."""
    quantize: Any = importlib.import_module("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    for linear in ModelView.of(model).linears:
        assert isinstance(linear.module, nn.Linear)
        made = quantize.HQQLinear(
            linear.module, config, compute_dtype=torch.float32, device="cpu", initialize=True, del_orig=False
        )
        linear.set_weight(made.dequantize())
    return bits + 2 * 16 / GROUP


def ours(name: str, amount: str = "bits", **options: Any) -> Callable[[PreTrainedModel, CalibrationSet, Any], float]:
    """A method of the weights room; `amount` is the option that says how much."""

    def run(model: PreTrainedModel, text: CalibrationSet, value: Any) -> float:
        from trimtab.core.recipe import Recipe
        from trimtab.models.compression import compress

        recipe = Recipe.from_dict({"steps": [{"method": name, amount: value, **options}]}, source=name)
        compress(model, recipe, calibration=text, progress=False)
        found = ledger_of(model).bits_per_weight
        assert found is not None
        return found

    return run


SYSTEMS: dict[str, tuple[str, Quantize]] = {
    "trimtab/gptq": ("trimtab", ours("gptq")),
    "trimtab/gptq act-order": ("trimtab", ours("gptq", act_order=True)),
    "trimtab/awq": ("trimtab", ours("awq")),
    "trimtab/hqq": ("trimtab", ours("hqq")),
    "trimtab/pv_tuning": ("trimtab", ours("pv_tuning")),
    "trimtab/vq": ("trimtab", ours("vq")),
    "trimtab/pv_tuning of vq": ("trimtab", ours("pv_tuning", base="vq")),
    "llmcompressor/gptq": ("llmcompressor", llmcompressor),
    "auto-round": ("auto-round", auto_round),
    "hqq": ("hqq", hqq),
}


def measure(model: str = "ref", bits: Sequence[int] = (2, 3), processes: int = 2) -> Iterator[dict[str, Any]]:
    """One entry for each system and number of bits: KL, seconds, peak memory, or the error that stopped it.

    processes   systems measured at a time, each with one thread
    """
    jobs = [(model, system, count) for system in SYSTEMS for count in bits]
    yield from each_alone(_entry, jobs, processes)


def each_alone(entry: Callable[..., dict[str, Any]], jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Any]:
    """`entry` of each job in a process of its own with one thread, some at a time: peaks of memory are its own."""
    alone: dict[str, Any] = {"max_tasks_per_child": 1, "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(processes, initializer=_one_thread, **alone) as pool:
        yield from pool.map(entry, *zip(*jobs, strict=True))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _entry(model: str, system: str, bits: int) -> dict[str, Any]:
    package, quantize = SYSTEMS[system]
    return {"system": system, "bits": bits, "group_size": GROUP, **figures(model, package, quantize, bits)}


def figures(
    model: str, package: str, compress: Callable[[PreTrainedModel, CalibrationSet, Any], float], amount: Any
) -> dict[str, Any]:
    """Version, seconds, peak memory, stored bits per weight and KL of one system; or its error.

    compress   (model, text, amount) -> stored bits per weight, everything; changes the model in place
    """
    subject = load(model, dtype=torch.float32)
    text = CalibrationSet.from_text(None, tokenizer_of(subject), sequences=SEQUENCES, length=LENGTH)
    entry: dict[str, Any] = {"calibration_tokens": text.count}
    try:
        version = importlib.metadata.version(package)
        importlib.import_module(package.replace("-", "_"))  # which takes some of them seconds
        started = time.perf_counter()
        stored = compress(subject, text, amount)
    except Exception as error:  # another library's, or it is not installed: its row says so
        return {**entry, "error": f"{type(error).__name__}: {error}"}
    seconds, peak = time.perf_counter() - started, memory("VmHWM")
    moved = divergence(subject, NextTokens.of(load(model, dtype=torch.float32), windows=WINDOWS)).estimates()
    return {
        **entry,
        "version": version,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "bits_per_weight": stored,
        "prose": {name: estimate.to_dict() for name, estimate in moved.items()},
    }
