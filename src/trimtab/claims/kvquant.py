"""Claims of KVQuant: learnt levels and outliers against a uniform grid, keys before rotary embedding."""

from __future__ import annotations

from trimtab.cache import Kvquant
from trimtab.claims._caches import MEASURED, closer, figures, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]


def beats_uniform_at_3_bits() -> Outcome:
    learnt = measured(Kvquant(bits=3), "activations")
    uniform = measured(Kvquant(bits=3, uniform=True, outliers=0.0), "activations")
    dense = measured(Kvquant(bits=3, outliers=0.0), "activations")
    return Outcome(
        measured=figures("nuq3_1_percent", learnt) | figures("nuq3_without_outliers", dense),
        baseline=figures("uniform_3", uniform),
        holds=closer(learnt, uniform),
    )


def learnt_levels_at_2_bits() -> Outcome:
    learnt = measured(Kvquant(bits=2))
    uniform = measured(Kvquant(bits=2, uniform=True))
    return Outcome(
        measured=figures("nuq2_1_percent", learnt),
        baseline=figures("uniform_2_1_percent", uniform),
        holds=closer(learnt, uniform),
    )


_PAPER = method_info("kvquant").paper

CLAIMS = (
    Claim(
        "kvquant",
        _PAPER,
        "At 3 bits, learnt levels with 1 % of outliers lose 0.07 perplexity where uniform quantization breaks "
        "(LLaMA-7B: "
        "5.75 against 10.87, 5.68 in 16 bits).",
        f"ref with outlier channels, keys per channel before rotary embedding in all cases, {MEASURED}. Holds if KL is "
        "smaller (paired 95 % interval) than with a uniform grid between the extremes, the baseline.",
        beats_uniform_at_3_bits,
    ),
    Claim(
        "kvquant",
        _PAPER,
        "Levels learnt by k-means weighted with squared gradients are better than equally spaced ones, all else equal.",
        f"ref, 2 bits, 1 % of outliers, {MEASURED}. Holds if KL is smaller (paired 95 % interval) than with equally "
        "spaced levels between the same limits, the baseline.",
        learnt_levels_at_2_bits,
    ),
)
