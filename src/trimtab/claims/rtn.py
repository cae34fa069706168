"""Claims on round-to-nearest, the baseline that every weight quantizer is measured against."""

from __future__ import annotations

import itertools
from typing import Literal

import torch

from trimtab.claims._reference import MEASURED, measured, predictions
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import divergence
from trimtab.models import load
from trimtab.models.counting import ledger_of
from trimtab.weights import Rtn

__all__ = ["CLAIMS"]

Bits = Literal[2, 3, 4, 8]

BITS: tuple[Bits, ...] = (8, 4, 3, 2)
NEAR_LOSSLESS_KL = 1e-3
ERROR_TOLERANCE = 0.1


def near_lossless_at_8_bits() -> Outcome:
    found = measured(Rtn(bits=8)).divergence.estimates()
    kl, agreement = found["kl_nats_per_token"], found["top1_agreement"]
    return Outcome(
        measured={
            "kl_nats_per_token": kl.value,
            "kl_nats_per_token_high": kl.high,
            "top1_agreement": agreement.value,
            "bytes_at_rest": measured(Rtn(bits=8)).bytes_at_rest,
        },
        baseline={
            "kl_nats_per_token_at_2_bits": measured(Rtn(bits=2)).kl,
            "bytes_at_rest_uncompressed": ledger_of(load("ref")).bytes_at_rest,
        },
        holds=kl.high <= NEAR_LOSSLESS_KL,
    )


def error_follows_the_step() -> Outcome:
    """The step of b bits is range / (2^b - 1), and the mean squared error of rounding is step^2 / 12."""
    errors = {bits: measured(Rtn(bits=bits)).relative_weight_error for bits in BITS}
    ratios = {f"error_ratio_{a}_to_{b}_bits": errors[b] / errors[a] for a, b in itertools.pairwise(BITS)}
    theory = {f"error_ratio_{a}_to_{b}_bits": ((2**a - 1) / (2**b - 1)) ** 2 for a, b in itertools.pairwise(BITS)}
    return Outcome(
        measured={f"relative_weight_error_{bits}_bits": error for bits, error in errors.items()} | ratios,
        baseline=theory,
        holds=all(abs(ratios[name] / theory[name] - 1) <= ERROR_TOLERANCE for name in theory),
    )


def good_at_4_bits_broken_at_2() -> Outcome:
    small = divergence(load("ref-mini", dtype=torch.float32), predictions()).estimates()["kl_nats_per_token"]
    kl = {bits: measured(Rtn(bits=bits)).divergence.estimates()["kl_nats_per_token"] for bits in BITS}
    ordered = all(
        measured(Rtn(bits=a)).divergence.kl_difference(measured(Rtn(bits=b)).divergence).high < 0
        for a, b in itertools.pairwise(BITS)
    )
    return Outcome(
        measured={f"kl_nats_per_token_{bits}_bits": estimate.value for bits, estimate in kl.items()}
        | {f"bytes_at_rest_{bits}_bits": measured(Rtn(bits=bits)).bytes_at_rest for bits in BITS},
        baseline={
            "kl_nats_per_token_ref_mini": small.value,
            "bytes_at_rest_ref_mini": ledger_of(load("ref-mini")).bytes_at_rest,
        },
        holds=ordered and kl[4].high < small.low and kl[4].high < 0.1 * kl[2].low,
    )


_PAPER = method_info("rtn").paper

CLAIMS = (
    Claim(
        "rtn",
        _PAPER,
        "Rounding weights to 8 bits with one scale per group is all but lossless.",
        f"ref at 8 bits, {MEASURED}. Holds if the upper 95 % bound of KL is at most {NEAR_LOSSLESS_KL} nats per token. "
        "Baseline: 2 bits.",
        near_lossless_at_8_bits,
    ),
    Claim(
        "rtn",
        _PAPER,
        "The squared error of rounding is that of a uniform grid: it grows as 1 / (2^bits - 1)^2, four- to fivefold "
        "for each bit fewer.",
        "|W~ - W|^2 / |W|^2, mean over the linears of ref, at 8, 4, 3 and 2 bits. Holds if each ratio of neighbours is "
        f"within {ERROR_TOLERANCE:.0%} of ((2^a - 1) / (2^b - 1))^2, which is the baseline.",
        error_follows_the_step,
    ),
    Claim(
        "rtn",
        _PAPER,
        "Rounding to nearest is good enough at 4 bits and breaks at 2.",
        f"ref at 8, 4, 3 and 2 bits, {MEASURED}. Holds if KL grows with each step down (paired 95 % interval), the "
        "4-bit model is closer to ref than ref-mini is, a trained model of a sixth of its size, and KL at 2 bits is "
        "more than ten times that at 4.",
        good_at_4_bits_broken_at_2,
    ),
)
