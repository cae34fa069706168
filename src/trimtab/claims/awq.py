"""Claims of AWQ: a few input channels matter most, and scaling them up before rounding protects them."""

from __future__ import annotations

from trimtab.claims._reference import SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.outliers import Kind
from trimtab.weights import Awq, Rtn

__all__ = ["CLAIMS"]

_SEEDS = (0, 1)


def beats_rtn() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in (4, 3):
        awq, rtn = measured(Awq(bits=bits)), measured(Rtn(bits=bits))
        high = awq.divergence.kl_difference(rtn.divergence).high
        found |= {
            f"kl_nats_per_token_{bits}_bits": awq.kl,
            f"kl_difference_high_{bits}_bits": high,
            f"bytes_at_rest_{bits}_bits": awq.bytes_at_rest,
        }
        baseline |= {
            f"rtn_kl_nats_per_token_{bits}_bits": rtn.kl,
            f"rtn_bytes_at_rest_{bits}_bits": rtn.bytes_at_rest,
        }
        holds &= high < 0 and awq.bytes_at_rest == rtn.bytes_at_rest
    return Outcome(found, baseline, holds=holds)


def _with_outliers(other: Awq | Rtn, kind: Kind) -> Outcome:
    """3 bits, for each seed of the calibration text and of the outlier channels."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in _SEEDS:
        awq, worse = measured(Awq(bits=3), kind, seed), measured(other, kind, seed)
        found[f"kl_nats_per_token_seed_{seed}"] = awq.kl
        found[f"kl_difference_high_seed_{seed}"] = awq.divergence.kl_difference(worse.divergence).high
        baseline[f"{other.name()}_kl_nats_per_token_seed_{seed}"] = worse.kl
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in _SEEDS))


def beats_rtn_with_outliers() -> Outcome:
    return _with_outliers(Rtn(bits=3), "activations")


def scaling_is_what_protects_outliers() -> Outcome:
    return _with_outliers(Awq(bits=3, scaling="none"), "activations")


_PAPER = method_info("awq").paper
_STRESS = "ref with injected activation outliers (stress setting: scale 16, 8 channels per site) at 3 bits"

CLAIMS = (
    Claim(
        "awq",
        _PAPER,
        "AWQ is closer to the original model than rounding to nearest at the same bytes.",
        f"ref at 4 and 3 bits, {SETTING}. Holds if the paired 95 % interval of the difference in KL to "
        "round-to-nearest lies below zero at each width, at equal bytes.",
        beats_rtn,
    ),
    Claim(
        "awq",
        _PAPER,
        "The same where a few input channels are much larger than the others, which is what AWQ is for.",
        f"{_STRESS}, {SETTING}. Holds if the paired 95 % interval of the difference in KL to round-to-nearest lies "
        "below zero for each of two seeds of text and channels.",
        beats_rtn_with_outliers,
    ),
    Claim(
        "awq",
        _PAPER,
        "It is the scaling of channels that protects them, not the clipping of ranges alone.",
        f"{_STRESS}, {SETTING}. Holds if the paired 95 % interval of the difference in KL to AWQ that only clips lies "
        "below zero for each of two seeds.",
        scaling_is_what_protects_outliers,
    ),
)
