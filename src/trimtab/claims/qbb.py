"""Claims of QBB: refined binary bases beat greedy ones and rounding to nearest, and need no data."""

from __future__ import annotations

from trimtab.claims._reference import MEASURED, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Qbb, Rtn

__all__ = ["CLAIMS"]


def refinement_beats_the_greedy_start() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for bits in (3, 4):
        refined = measured(Qbb(bits=bits, holistic=False))
        start = measured(Qbb(bits=bits, refine="none", holistic=False))
        found |= {
            f"kl_nats_per_token_{bits}_bases": refined.kl,
            f"kl_difference_high_{bits}_bases": refined.divergence.kl_difference(start.divergence).high,
        }
        baseline[f"greedy_kl_nats_per_token_{bits}_bases"] = start.kl
    return Outcome(found, baseline, holds=all(v < 0 for k, v in found.items() if k.startswith("kl_difference")))


def beats_rounding_of_rows() -> Outcome:
    """N bases against N-bit asymmetric codes with one scale and zero point per row: almost equal bytes."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in (3, 4):
        bases, rounded = measured(Qbb(bits=bits)), measured(Rtn(bits=bits, group_size=-1))
        high = bases.divergence.kl_difference(rounded.divergence).high
        found |= {
            f"kl_nats_per_token_{bits}_bases": bases.kl,
            f"kl_difference_high_{bits}_bases": high,
            f"bits_per_weight_{bits}_bases": bases.bits_per_weight,
        }
        baseline |= {
            f"rtn_kl_nats_per_token_{bits}_bits": rounded.kl,
            f"rtn_bits_per_weight_{bits}_bits": rounded.bits_per_weight,
        }
        holds &= high < 0 and bases.bits_per_weight < 1.1 * rounded.bits_per_weight
    return Outcome(found, baseline, holds=holds)


def training_the_scales_helps() -> Outcome:
    trained, untrained = measured(Qbb(bits=3)), measured(Qbb(bits=3, holistic=False))
    high = trained.divergence.kl_difference(untrained.divergence).high
    return Outcome(
        {"kl_nats_per_token": trained.kl, "kl_difference_high": high},
        {"stages_1_and_2_kl_nats_per_token": untrained.kl},
        holds=high < 0,
    )


_PAPER = method_info("qbb").paper
_HOLDS = "Holds if the paired 95 % interval of the difference in KL lies below zero"

CLAIMS = (
    Claim(
        "qbb",
        _PAPER,
        "Refining the bases after the greedy start is what makes them useful.",
        f"ref with 3 and 4 bases, without stage 3, {MEASURED}. {_HOLDS} at both.",
        refinement_beats_the_greedy_start,
    ),
    Claim(
        "qbb",
        _PAPER,
        "N refined bases are better than N-bit rounding of rows.",
        f"ref with 3 and 4 bases against rtn with one group per row, {MEASURED}. {_HOLDS} at both, with at most 10 % "
        "more bits per weight.",
        beats_rounding_of_rows,
    ),
    Claim(
        "qbb",
        _PAPER,
        "Training the scales on text that the model writes itself brings the compressed model closer still.",
        f"ref with 3 bases, {MEASURED}. {_HOLDS}.",
        training_the_scales_helps,
    ),
)
