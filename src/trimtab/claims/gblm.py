"""Claims of GBLM-Pruner: the gradient adds something to magnitude and input norm."""

from __future__ import annotations

from trimtab.claims._pruning import CLOSER, closer
from trimtab.claims._reference import SETTING
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Gblm, Magnitude, Wanda

__all__ = ["CLAIMS"]


def beats_magnitude() -> Outcome:
    return closer(Gblm(value_dtype="bfloat16"), Magnitude(value_dtype="bfloat16"))


def beats_wanda() -> Outcome:
    return closer(Gblm(value_dtype="bfloat16"), Wanda(value_dtype="bfloat16"))


def beats_wanda_at_four_of_eight() -> Outcome:
    return closer(Gblm(sparsity="4:8", value_dtype="bfloat16"), Wanda(sparsity="4:8", value_dtype="bfloat16"))


_PAPER = method_info("gblm").paper

CLAIMS = (
    Claim(
        "gblm",
        _PAPER,
        "At 50 % GBLM stays closer to the original model than magnitude pruning.",
        f"ref, {SETTING}. {CLOSER.format('magnitude pruning')}.",
        beats_magnitude,
    ),
    Claim(
        "gblm",
        _PAPER,
        "At 50 % GBLM stays closer to the original model than Wanda.",
        f"ref, {SETTING}. {CLOSER.format('Wanda')}.",
        beats_wanda,
    ),
    Claim(
        "gblm",
        _PAPER,
        "At 4:8 GBLM stays closer to the original model than Wanda.",
        f"ref, {SETTING}. {CLOSER.format('Wanda')}.",
        beats_wanda_at_four_of_eight,
    ),
)
