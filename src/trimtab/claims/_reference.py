"""What the claims of weight methods share: compress `ref` in one way, and measure how far it has moved.

Calibration text is the shipped prose for calibration, measurement the held-out prose; the two have no book in common.
Everything is computed in float32. Results are kept while the process lives, so claims that need the same run share it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trimtab.evaluation import Divergence, NextTokens, divergence, inject_outliers
from trimtab.evaluation.outliers import Kind
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.counting import ledger_of
from trimtab.models.info import info_of
from trimtab.weights.base import WeightMethod

SEQUENCES, LENGTH = 32, 256
WINDOWS = 24
SEEDS = (0, 1, 2)
MEASURED = f"measured as KL(ref || compressed) on {WINDOWS} x 256 tokens of held-out prose"
SETTING = f"calibrated on {SEQUENCES} x {LENGTH} tokens of other prose, {MEASURED}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One compressed model: how far it is from `ref`, and what it takes. The weight error is 0 for methods that slice,
    whose weights have no counterpart to be compared with."""

    divergence: Divergence
    bytes_at_rest: int
    bits_per_weight: float
    relative_weight_error: float

    @property
    def kl(self) -> float:
        return self.divergence.estimates()["kl_nats_per_token"].value


def reference(outliers: Kind | None = None, seed: int = 0) -> PreTrainedModel:
    """`ref` in float32, fresh; with outlier channels if asked."""
    model = load("ref", dtype=torch.float32)
    if outliers is not None:
        inject_outliers(model, kind=outliers, seed=seed)
    return model


@functools.cache
def predictions() -> NextTokens:
    """What `ref` predicts on held-out prose; the same with outlier channels, which change no logit."""
    return NextTokens.of(reference(), windows=WINDOWS)


@functools.cache
def measured(method: WeightMethod, outliers: Kind | None = None, seed: int = 0) -> Measured:
    """Compress `ref` by the method and compare its predictions. `seed` draws calibration text and outlier channels."""
    model = reference(outliers, seed)
    calibration = None
    if method.needs_text:
        tokenizer = tokenizer_of(model)
        calibration = CalibrationSet.from_text(None, tokenizer, sequences=SEQUENCES, length=LENGTH, seed=seed)
    compress(model, method, calibration=calibration, seed=seed)
    record = info_of(model).record
    assert record is not None
    errors = [float(entry.get("relative_weight_error", 0.0)) for entry in record.changed]
    moved = divergence(model, predictions())
    ledger = ledger_of(
        torch.nn.Module.bfloat16(model)
    )  # the embedding as it ships; nobody computes with this model any more
    return Measured(
        divergence=moved,
        bytes_at_rest=ledger.bytes_at_rest,
        bits_per_weight=ledger.bits_per_weight or 0.0,
        relative_weight_error=sum(errors) / len(errors),
    )
