"""Claims of MergeQuant: fixed steps per channel serve 4-bit inputs as well as steps measured per token, or better."""

from __future__ import annotations

from transformers import PreTrainedModel

from trimtab.claims._reference import SETTING, measured, reference
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.outliers import Kind
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.info import tokenizer_of
from trimtab.models.views import ModelView
from trimtab.tensors.activations import ActivationGrid
from trimtab.weights import Mergequant, Rtn
from trimtab.weights.base import WeightMethod

__all__ = ["CLAIMS"]

_WHOLE = Mergequant()
_PER_TOKEN = Rtn(bits=4, group_size=-1, symmetric=True, activation_bits=4)
_MIGRATION = Mergequant(rotate=False, split=False, adaptive_clip=False, rank=0, gptq=False)


def _beats(others: dict[str, WeightMethod], outliers: Kind | None) -> Outcome:
    ours = measured(_WHOLE, outliers)
    found = {"kl_nats_per_token": ours.kl, "bits_per_weight": ours.bits_per_weight}
    baseline: dict[str, float] = {}
    for name, method in others.items():
        other = measured(method, outliers)
        found[f"kl_difference_high_{name}"] = ours.divergence.kl_difference(other.divergence).high
        baseline |= {f"{name}_kl_nats_per_token": other.kl, f"{name}_bits_per_weight": other.bits_per_weight}
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_{name}"] < 0 for name in others))


def beats_rounding_and_migration() -> Outcome:
    return _beats({"rtn": _PER_TOKEN, "migration": _MIGRATION}, None)


def beats_rounding_and_migration_with_outliers() -> Outcome:
    return _beats({"rtn": _PER_TOKEN, "migration": _MIGRATION}, "activations")


def static_layers_measure_nothing() -> Outcome:
    """Counted in the model as it is stored: layers whose input has a fixed step, and those with a step per token."""
    found = {"static_linears": 0.0, "per_token_linears": 0.0, "static_share_of_weights": 0.0}
    total = 0
    model = _migrated()
    behind_norms = True
    for linear in ModelView.of(model).linears:
        assert linear.compressed is not None
        transform = linear.compressed.tensor.transform
        static = isinstance(transform, ActivationGrid) and transform.mode == "static"
        weights = linear.in_features * linear.out_features
        found["static_linears" if static else "per_token_linears"] += 1
        found["static_share_of_weights"] += weights * static
        total += weights
        behind_norms &= static == (linear.role not in ("o", "down"))
    found["static_share_of_weights"] /= total
    return Outcome(found, {"static_linears_of_rounding_per_token": 0.0}, holds=behind_norms)


def _migrated() -> PreTrainedModel:
    model = reference()
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=4, length=256)
    return compress(model, _MIGRATION, calibration=text, progress=False)


_PAPER = method_info("mergequant").paper
_BASELINES = (
    "rounding weights per row and inputs per token, and step migration alone (no splitting, clipping, compensation or "
    "rotation)"
)
_HOLDS = "Holds if the paired 95 % intervals of the differences in KL lie below zero"

CLAIMS = (
    Claim(
        "mergequant",
        _PAPER,
        "At W4A4 MergeQuant is closer to the original model than rounding per token and than plain step migration.",
        f"ref, weights and inputs at 4 bits, against {_BASELINES}; {SETTING}. {_HOLDS}.",
        beats_rounding_and_migration,
    ),
    Claim(
        "mergequant",
        _PAPER,
        "The same where a few input channels are much larger than the others.",
        "ref with injected activation outliers (stress setting: scale 16, 8 channels per site), weights and inputs at "
        f"4 bits, against {_BASELINES}; {SETTING}. {_HOLDS}.",
        beats_rounding_and_migration_with_outliers,
    ),
    Claim(
        "mergequant",
        _PAPER,
        "Inputs of all linears behind norms are rounded with fixed steps: nothing is measured at run time.",
        "Every linear of ref after step migration. Holds if exactly q, k, v, gate and up have static inputs.",
        static_layers_measure_nothing,
    ),
)
