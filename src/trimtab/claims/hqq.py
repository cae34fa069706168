"""Claims on half-quadratic quantization."""

from __future__ import annotations

from typing import Literal

from trimtab.claims._reference import MEASURED, SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Gptq, Hqq, Rtn

__all__ = ["CLAIMS"]

COMPETITIVE = 1.1
BITS: tuple[Literal[4, 3, 2], ...] = (4, 3, 2)


def beats_rtn() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        hqq, rtn, clipped = (measured(m) for m in (Hqq(bits=bits), Rtn(bits=bits), Rtn(bits=bits, clip="mse")))
        high = hqq.divergence.kl_difference(rtn.divergence).high
        found |= {
            f"kl_nats_per_token_{bits}_bits": hqq.kl,
            f"kl_difference_high_{bits}_bits": high,
            f"bits_per_weight_{bits}_bits": hqq.bits_per_weight,
        }
        baseline |= {
            f"rtn_kl_nats_per_token_{bits}_bits": rtn.kl,
            f"rtn_with_clip_kl_nats_per_token_{bits}_bits": clipped.kl,
            f"rtn_bits_per_weight_{bits}_bits": rtn.bits_per_weight,
        }
        holds &= high < 0
    return Outcome(found, baseline, holds)


def competes_with_calibration() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for bits in BITS[:2]:
        found[f"kl_nats_per_token_{bits}_bits"] = measured(Hqq(bits=bits)).kl
        baseline[f"gptq_kl_nats_per_token_{bits}_bits"] = measured(Gptq(bits=bits)).kl
    pairs = zip(found.values(), baseline.values(), strict=True)
    return Outcome(found, baseline, holds=all(hqq <= COMPETITIVE * gptq for hqq, gptq in pairs))


_PAPER = method_info("hqq").paper

CLAIMS = (
    Claim(
        "hqq",
        _PAPER,
        "Searching for the zero points loses less than rounding to nearest with the same scales.",
        f"ref at 4, 3 and 2 bits, {MEASURED}. Holds if the paired 95 % interval of the difference in KL to rtn lies "
        "below zero at each. hqq stores 0.125 bits per weight more; rtn with a search for the scale instead, at rtn's "
        "bytes, stands beside it.",
        beats_rtn,
    ),
    Claim(
        "hqq",
        _PAPER,
        "Without data it competes with methods that calibrate.",
        f"ref at 4 and 3 bits against gptq, which is {SETTING}. Holds if KL is at most {COMPETITIVE} times gptq's at "
        "both.",
        competes_with_calibration,
    ),
)
