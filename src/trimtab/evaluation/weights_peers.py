"""Other libraries' quantizers and ours on one model at equal bytes: the same text, codes of 2 and 3 bits, groups of 64.

Run where the other libraries are installed. Each leaves rounded dense weights behind, which are measured as ours are:
KL to the original on held-out prose. All store 16-bit scales and whole zero points per group.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.evaluation.kl import NextTokens, divergence
from trimtab.evaluation.weight_decode.quantizing import llmcompressor_gptq
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import ModelView

GROUP = 64
SEQUENCES, LENGTH = 32, 256
WINDOWS = 24

Quantize = Callable[[PreTrainedModel, CalibrationSet, int], None]
"""Rounds the linears of the blocks in place: (model, text, bits)."""


def llmcompressor(model: PreTrainedModel, text: CalibrationSet, bits: int) -> None:
    """GPTQ of llmcompressor with its defaults, asymmetric groups."""
    llmcompressor_gptq(model, text.tokens, bits=bits, group_size=GROUP, symmetric=False)


def auto_round(model: PreTrainedModel, text: CalibrationSet, bits: int) -> None:
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


def hqq(model: PreTrainedModel, text: CalibrationSet, bits: int) -> None:
    """hqq with its defaults: no text, zero points are numbers."""
    quantize: Any = importlib.import_module("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    for linear in ModelView.of(model).linears:
        assert isinstance(linear.module, nn.Linear)
        made = quantize.HQQLinear(
            linear.module, config, compute_dtype=torch.float32, device="cpu", initialize=True, del_orig=False
        )
        linear.set_weight(made.dequantize())


def _ours(name: str, **options: Any) -> Quantize:
    def run(model: PreTrainedModel, text: CalibrationSet, bits: int) -> None:
        from trimtab.core.recipe import Recipe
        from trimtab.weights import compress

        recipe = Recipe.from_dict({"steps": [{"method": name, "bits": bits, **options}]}, source=name)
        compress(model, recipe, calibration=text, progress=False)

    return run


SYSTEMS: dict[str, tuple[str, Quantize]] = {
    "trimtab/gptq": ("trimtab", _ours("gptq")),
    "trimtab/gptq act-order": ("trimtab", _ours("gptq", act_order=True)),
    "trimtab/awq": ("trimtab", _ours("awq")),
    "trimtab/hqq": ("trimtab", _ours("hqq")),
    "trimtab/pv_tuning": ("trimtab", _ours("pv_tuning")),
    "llmcompressor/gptq": ("llmcompressor", llmcompressor),
    "auto-round": ("auto-round", auto_round),
    "hqq": ("hqq", hqq),
}


def measure(model: str = "ref", bits: tuple[int, ...] = (2, 3)) -> Iterator[dict[str, Any]]:
    """One entry for each system and number of bits: KL, seconds, or the error that stopped it."""
    predictions = NextTokens.of(load(model, dtype=torch.float32), windows=WINDOWS)
    for count in bits:
        for system, (package, quantize) in SYSTEMS.items():
            subject = load(model, dtype=torch.float32)
            text = CalibrationSet.from_text(None, tokenizer_of(subject), sequences=SEQUENCES, length=LENGTH)
            entry: dict[str, Any] = {"system": system, "bits": count, "group_size": GROUP}
            started = time.perf_counter()
            try:
                version = importlib.metadata.version(package)
                quantize(subject, text, count)
            except Exception as error:  # another library's, or it is not installed: its row says so
                yield {**entry, "error": f"{type(error).__name__}: {error}"}
                continue
            seconds = time.perf_counter() - started
            moved = divergence(subject, predictions).estimates()
            figures = {name: estimate.to_dict() for name, estimate in moved.items()}
            yield {**entry, "version": version, "seconds": seconds, "prose": figures}
