"""Claims of Wanda: weighing magnitudes by input norms beats magnitudes, without an update."""

from __future__ import annotations

from trimtab.claims._pruning import CLOSER, closer
from trimtab.claims._reference import SETTING
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.outliers import Kind
from trimtab.weights import Magnitude, Wanda

__all__ = ["CLAIMS"]


def _beats_magnitude(sparsity: float | str, outliers: Kind | None = None) -> Outcome:
    return closer(
        Wanda(sparsity=sparsity, value_dtype="bfloat16"), Magnitude(sparsity=sparsity, value_dtype="bfloat16"), outliers
    )


def beats_magnitude() -> Outcome:
    return _beats_magnitude(0.5)


def beats_magnitude_at_two_of_four() -> Outcome:
    return _beats_magnitude("2:4")


def beats_magnitude_with_outliers() -> Outcome:
    return _beats_magnitude(0.5, "activations")


_PAPER = method_info("wanda").paper
_RULE = CLOSER.format("magnitude pruning")

CLAIMS = (
    Claim(
        "wanda",
        _PAPER,
        "At 50 % Wanda stays closer to the original model than magnitude pruning.",
        f"ref, {SETTING}. {_RULE}.",
        beats_magnitude,
    ),
    Claim(
        "wanda",
        _PAPER,
        "At 2:4 Wanda stays closer to the original model than magnitude pruning.",
        f"ref, {SETTING}. {_RULE}.",
        beats_magnitude_at_two_of_four,
    ),
    Claim(
        "wanda",
        _PAPER,
        "The same at 50 % with outlier channels in the activations, as large models have.",
        "ref with injected activation outliers (stress setting: scale 16, 8 channels per site), "
        f"{SETTING}. {_RULE} and channels.",
        beats_magnitude_with_outliers,
    ),
)
