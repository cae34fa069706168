"""What every room that changes a model in place does alike: look at weights before, choose text, list what was left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.core.errors import NumericsError, TargetError
from trimtab.core.run_record import RunRecord
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.info import tokenizer_of
from trimtab.models.views import LinearView, ModelView

Calibration = CalibrationSet | str | Path


def check_weight(linear: LinearView) -> None:
    """Raise TargetError for a weight that is not loaded, NumericsError for one with NaN or infinity."""
    weight = linear.weight
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise TargetError(
            f"{linear.name} holds {weight.dtype} on {weight.device}; load the model with its full weights."
        )
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise NumericsError(
            f"the weight of {linear.name} holds {int(weight.isnan().sum())} NaN and {int(weight.isinf().sum())} "
            f"infinite values, the first at row {row}, column {column}. The model is damaged: get it again."
        )


def calibration_set(model: PreTrainedModel, calibration: Calibration | None, seed: int) -> CalibrationSet:
    """The text to calibrate on; None: the prose that comes with trimtab, as long as the model's context allows."""
    if isinstance(calibration, CalibrationSet):
        return calibration
    context = getattr(model.config, "max_position_embeddings", None)
    return CalibrationSet.from_text(calibration, tokenizer_of(model), context=context, seed=seed)


def described(calibration: CalibrationSet | None) -> dict[str, Any] | None:
    """JSON values that identify a calibration set."""
    if calibration is None:
        return None
    sequences, length = calibration.tokens.shape
    return {
        "source": calibration.source,
        "sha256": calibration.sha256,
        "sequences": sequences,
        "length": length,
        "tokens": calibration.count,
    }


def unchanged(model: PreTrainedModel, record: RunRecord) -> Iterator[dict[str, str]]:
    """Layers with a weight matrix that were left alone, and why; `record` has those that were changed, and the reasons
    that the method itself entered while it ran."""
    changed = {entry["linear"] for entry in record.changed}
    known = {entry["module"]: entry["reason"] for entry in record.unchanged}
    view = ModelView.of(model)
    blocks = {linear.name for linear in view.linears}
    for name, module in model.named_modules():
        if module is view.lm_head:
            yield {"module": name, "reason": "the output head is never compressed"}
        elif isinstance(module, nn.Embedding):
            yield {"module": name, "reason": "embeddings are never compressed"}
        elif isinstance(module, (nn.Linear, Conv1D)) and name not in changed:
            inside = "no pattern in `targets` matches it"
            reason = known.get(name, inside if name in blocks else "it is not a linear of a block")
            yield {"module": name, "reason": reason}
