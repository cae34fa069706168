"""Claims on NormalFloat and the quantization of its scales."""

from __future__ import annotations

from typing import Literal

from trimtab.claims._reference import MEASURED, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Nf, Rtn

__all__ = ["CLAIMS"]

FREE = 0.02
BITS: tuple[Literal[4, 3], ...] = (4, 3)


def beats_integers_of_the_same_size() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        nf, integers = measured(Nf(bits=bits)), measured(Rtn(bits=bits, symmetric=True))
        high = nf.divergence.kl_difference(integers.divergence).high
        found |= {
            f"kl_nats_per_token_{bits}_bits": nf.kl,
            f"kl_difference_high_{bits}_bits": high,
            f"bytes_at_rest_{bits}_bits": nf.bytes_at_rest,
        }
        baseline |= {
            f"integer_kl_nats_per_token_{bits}_bits": integers.kl,
            f"bytes_at_rest_integer_{bits}_bits": integers.bytes_at_rest,
        }
        holds &= high < 0 and nf.bytes_at_rest <= integers.bytes_at_rest
    return Outcome(found, baseline, holds)


def double_quantization_is_free() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        double, plain = measured(Nf(bits=bits, double_quant=True)), measured(Nf(bits=bits))
        found |= {
            f"kl_nats_per_token_{bits}_bits": double.kl,
            f"bits_per_weight_{bits}_bits": double.bits_per_weight,
            f"relative_weight_error_{bits}_bits": double.relative_weight_error,
        }
        baseline |= {
            f"plain_kl_nats_per_token_{bits}_bits": plain.kl,
            f"plain_bits_per_weight_{bits}_bits": plain.bits_per_weight,
            f"plain_relative_weight_error_{bits}_bits": plain.relative_weight_error,
        }
        holds &= double.kl <= (1 + FREE) * plain.kl and double.bits_per_weight < plain.bits_per_weight - 0.12
    return Outcome(found, baseline, holds)


def smaller_groups_for_the_saved_bytes() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        nf, grid = measured(Nf(bits=bits, group_size=32, double_quant=True)), measured(Rtn(bits=bits))
        found |= {
            f"kl_nats_per_token_{bits}_bits": nf.kl,
            f"kl_difference_high_{bits}_bits": nf.divergence.kl_difference(grid.divergence).high,
            f"bits_per_weight_{bits}_bits": nf.bits_per_weight,
        }
        baseline |= {
            f"grid_kl_nats_per_token_{bits}_bits": grid.kl,
            f"grid_bits_per_weight_{bits}_bits": grid.bits_per_weight,
        }
        holds &= nf.kl < grid.kl and nf.bits_per_weight < grid.bits_per_weight
    return Outcome(found, baseline, holds)


_PAPER = method_info("nf").paper

CLAIMS = (
    Claim(
        "nf",
        _PAPER,
        "NormalFloat loses less than integers of the same size.",
        f"ref at 4 and 3 bits in groups of 64, against symmetric integers at the same bytes, {MEASURED}. Holds if the "
        "paired 95 % interval of the difference in KL lies below zero at both.",
        beats_integers_of_the_same_size,
    ),
    Claim(
        "nf",
        _PAPER,
        "Quantizing the scales too saves bytes and costs no quality.",
        f"ref at 4 and 3 bits with and without, {MEASURED}. Holds if it saves 0.12 bits per weight and KL rises by at "
        f"most {FREE:.0%}.",
        double_quantization_is_free,
    ),
    Claim(
        "nf",
        _PAPER,
        "With the saved bytes spent on smaller groups it beats asymmetric integers, which have a zero point, in fewer "
        "bytes.",
        f"ref at 4 and 3 bits, groups of 32 with quantized scales against rtn in groups of 64, {MEASURED}. Holds if KL "
        "and bytes are both lower at both widths.",
        smaller_groups_for_the_saved_bytes,
    ),
)
