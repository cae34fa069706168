"""Claims of QLLM: with rounded inputs, splitting loud channels and correcting errors beat plain rounding."""

from __future__ import annotations

from trimtab.claims._reference import SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.outliers import Kind
from trimtab.weights import Qllm, Rtn

__all__ = ["CLAIMS"]

_PLAIN = Rtn(bits=4, group_size=-1, activation_bits=4)
_SPLIT = Qllm(bits=4, activation_bits=4, rank=0, search_sequences=2)
_WHOLE = Qllm(bits=4, activation_bits=4, search_sequences=2, epochs=2)


def _against(better: Rtn | Qllm, worse: Rtn | Qllm, outliers: Kind | None, name: str) -> Outcome:
    found, other = measured(better, outliers), measured(worse, outliers)
    high = found.divergence.kl_difference(other.divergence).high
    return Outcome(
        {"kl_nats_per_token": found.kl, "kl_difference_high": high, "bits_per_weight": found.bits_per_weight},
        {f"{name}_kl_nats_per_token": other.kl, f"{name}_bits_per_weight": other.bits_per_weight},
        holds=high < 0,
    )


def beats_rounding_with_outliers() -> Outcome:
    return _against(_WHOLE, _PLAIN, "activations", "rtn")


def splitting_helps_with_outliers() -> Outcome:
    return _against(_SPLIT, _PLAIN, "activations", "rtn")


def correction_helps() -> Outcome:
    return _against(_WHOLE, _SPLIT, "activations", "split_only")


_PAPER = method_info("qllm").paper
_STRESS = (
    "ref with injected activation outliers (stress setting: scale 16, 8 channels per site), weights and inputs at "
    "4 bits"
)
_HOLDS = "Holds if the paired 95 % interval of the difference in KL lies below zero"

CLAIMS = (
    Claim(
        "qllm",
        _PAPER,
        "At W4A4 QLLM is better than rounding weights per row and inputs per token.",
        f"{_STRESS}, two epochs of correction, {SETTING}. {_HOLDS}.",
        beats_rounding_with_outliers,
    ),
    Claim(
        "qllm",
        _PAPER,
        "Splitting and merging channels alone is already better.",
        f"{_STRESS}, no correction, {SETTING}. {_HOLDS}.",
        splitting_helps_with_outliers,
    ),
    Claim(
        "qllm",
        _PAPER,
        "Low-rank error correction on top brings the model closer still.",
        f"{_STRESS}, two epochs of correction against none, {SETTING}. {_HOLDS}.",
        correction_helps,
    ),
)
