"""Claims of SparseGPT: correcting what is kept beats choosing alone, most of all where much is removed."""

from __future__ import annotations

from trimtab.claims._pruning import CLOSER, closer
from trimtab.claims._reference import SETTING
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Magnitude, Sparsegpt, Wanda

__all__ = ["CLAIMS"]


def beats_magnitude() -> Outcome:
    return closer(Sparsegpt(value_dtype="bfloat16"), Magnitude(value_dtype="bfloat16"))


def beats_wanda_at_two_of_four() -> Outcome:
    return closer(Sparsegpt(sparsity="2:4", value_dtype="bfloat16"), Wanda(sparsity="2:4", value_dtype="bfloat16"))


def beats_wanda_at_70_percent() -> Outcome:
    return closer(Sparsegpt(sparsity=0.7, value_dtype="bfloat16"), Wanda(sparsity=0.7, value_dtype="bfloat16"))


_PAPER = method_info("sparsegpt").paper

CLAIMS = (
    Claim(
        "sparsegpt",
        _PAPER,
        "At 50 % SparseGPT stays closer to the original model than magnitude pruning.",
        f"ref, {SETTING}. {CLOSER.format('magnitude pruning')}.",
        beats_magnitude,
    ),
    Claim(
        "sparsegpt",
        "Sun, Liu, Bair, Kolter, arXiv:2306.11695",
        "At 2:4 SparseGPT stays closer to the original model than Wanda.",
        f"ref, {SETTING}. {CLOSER.format('Wanda')}.",
        beats_wanda_at_two_of_four,
    ),
    Claim(
        "sparsegpt",
        "Sun, Liu, Bair, Kolter, arXiv:2306.11695",
        "At 70 % SparseGPT stays closer to the original model than Wanda.",
        f"ref, {SETTING}. {CLOSER.format('Wanda')}.",
        beats_wanda_at_70_percent,
    ),
)
