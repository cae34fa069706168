"""Claims of GPTQ: correcting later columns for the rounding of earlier ones beats rounding to nearest."""

from __future__ import annotations

from trimtab.claims._reference import SEEDS, SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.outliers import Kind
from trimtab.weights import Gptq, Rtn

__all__ = ["CLAIMS"]


def _beats_rtn(outliers: Kind | None) -> Outcome:
    """3 bits, three seeds of the calibration text (and of the outlier channels), same bytes."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    closer = same_bytes = True
    for seed in SEEDS:
        gptq = measured(Gptq(bits=3), outliers, seed)
        rtn = measured(Rtn(bits=3), outliers, seed if outliers else 0)
        difference = gptq.divergence.kl_difference(rtn.divergence)
        found |= {
            f"kl_nats_per_token_seed_{seed}": gptq.kl,
            f"kl_difference_high_seed_{seed}": difference.high,
            "bytes_at_rest": gptq.bytes_at_rest,
        }
        baseline |= {f"rtn_kl_nats_per_token_seed_{seed}": rtn.kl, "rtn_bytes_at_rest": rtn.bytes_at_rest}
        closer &= difference.high < 0
        same_bytes &= gptq.bytes_at_rest == rtn.bytes_at_rest
    return Outcome(found, baseline, holds=closer and same_bytes)


def beats_rtn() -> Outcome:
    return _beats_rtn(None)


def beats_rtn_with_activation_outliers() -> Outcome:
    return _beats_rtn("activations")


def beats_rtn_with_weight_outliers() -> Outcome:
    return _beats_rtn("weights")


def gains_at_all_low_bits() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    closer = True
    for bits in (4, 3, 2):
        gptq, rtn = measured(Gptq(bits=bits)), measured(Rtn(bits=bits))
        found |= {
            f"kl_nats_per_token_{bits}_bits": gptq.kl,
            f"kl_difference_high_{bits}_bits": gptq.divergence.kl_difference(rtn.divergence).high,
        }
        baseline[f"rtn_kl_nats_per_token_{bits}_bits"] = rtn.kl
        closer &= found[f"kl_difference_high_{bits}_bits"] < 0
    return Outcome(found, baseline, holds=closer)


def order_matters_with_outliers() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        ordered = measured(Gptq(bits=3, act_order=True), "activations", seed)
        plain = measured(Gptq(bits=3), "activations", seed)
        found[f"kl_nats_per_token_seed_{seed}"] = ordered.kl
        found[f"kl_difference_high_seed_{seed}"] = ordered.divergence.kl_difference(plain.divergence).high
        baseline[f"left_to_right_kl_nats_per_token_seed_{seed}"] = plain.kl
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in SEEDS))


_PAPER = method_info("gptq").paper
_RULE = (
    "Holds if at the same bytes the paired 95 % interval of the difference in KL to round-to-nearest lies below zero "
    "for each of three seeds"
)
_STRESS = "ref with injected {} outliers (stress setting: scale 16, 8 channels per site) at 3 bits"

CLAIMS = (
    Claim(
        "gptq",
        _PAPER,
        "At 3 bits GPTQ stays closer to the original model than rounding to nearest.",
        f"ref at 3 bits, {SETTING}. {_RULE} of the calibration text.",
        beats_rtn,
    ),
    Claim(
        "gptq",
        _PAPER,
        "The same with outlier channels in the activations, as large models have.",
        f"{_STRESS.format('activation')}, {SETTING}. {_RULE} of calibration text and channels.",
        beats_rtn_with_activation_outliers,
    ),
    Claim(
        "gptq",
        _PAPER,
        "The same with outlier columns in the weights.",
        f"{_STRESS.format('weight')}, {SETTING}. {_RULE} of calibration text and channels.",
        beats_rtn_with_weight_outliers,
    ),
    Claim(
        "gptq",
        _PAPER,
        "GPTQ beats rounding to nearest at 4, 3 and 2 bits.",
        f"ref at each width, {SETTING}. Holds if the paired 95 % interval of the difference in KL to round-to-nearest "
        "lies below zero at each width.",
        gains_at_all_low_bits,
    ),
    Claim(
        "gptq",
        "act-order: the authors' code (github.com/IST-DASLab/gptq), after the paper",
        "With outlier channels, quantizing columns by decreasing activation (act-order) beats going left to right.",
        f"{_STRESS.format('activation')}, {SETTING}. Holds if the paired 95 % interval of the difference in KL to "
        "left-to-right GPTQ lies below zero for each of three seeds.",
        order_matters_with_outliers,
    ),
)
