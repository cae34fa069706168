"""Claims of LQ-LoRA: quantizers chosen by an integer program, errors weighted by the Fisher information."""

from __future__ import annotations

from typing import Literal

from trimtab.claims._reference import SETTING, Measured, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Gptq, LqLora, Rtn

__all__ = ["CLAIMS"]

RANK = 8
TURNS = 5
WIDTHS: tuple[Literal[2, 3], ...] = (2, 3)
UNIFORM_BITS = {2: 2.095, 3: 3.1174}
"""Bits per weight of `_uniform`, which may choose between scales of 4 and 8 bits; the program's budget."""


def _uniform(bits: Literal[2, 3]) -> Measured:
    """One width and block size, the paper's default, for every matrix."""
    return measured(LqLora(budget_bits=bits + 0.2, rank=RANK, iterations=TURNS, widths=(bits,), block_sizes=(64,)))


def _program(bits: int, weighting: Literal["fisher", "none"] = "fisher") -> Measured:
    return measured(LqLora(budget_bits=UNIFORM_BITS[bits], rank=RANK, iterations=TURNS, weighting=weighting))


def _closer(ours: Measured, theirs: Measured, name: str) -> tuple[dict[str, float], dict[str, float], bool]:
    high = ours.divergence.kl_difference(theirs.divergence).high
    found = {
        f"kl_nats_per_token_{name}": ours.kl,
        f"kl_difference_high_{name}": high,
        f"bytes_at_rest_{name}": ours.bytes_at_rest,
    }
    other = {f"other_kl_nats_per_token_{name}": theirs.kl, f"other_bytes_at_rest_{name}": theirs.bytes_at_rest}
    return found, other, high < 0


def program_beats_uniform() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in WIDTHS:
        ours, theirs = _program(bits), _uniform(bits)
        more, other, closer = _closer(ours, theirs, f"{bits}_bits")
        found, baseline = found | more, baseline | other
        holds &= closer and ours.bytes_at_rest <= theirs.bytes_at_rest
    return Outcome(found, baseline, holds)


def fisher_beats_data_free() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in WIDTHS:
        more, other, closer = _closer(_program(bits), _program(bits, "none"), f"{bits}_bits")
        found, baseline, holds = found | more, baseline | other, holds and closer
    return Outcome(found, baseline, holds)


def beats(rival: type[Gptq] | type[Rtn]) -> Outcome:
    """At 3.1 bits, and the factors; the rival has 3 bits in groups of 32, which is a little less in all."""
    found, baseline, closer = _closer(_program(3), measured(rival(bits=3, group_size=32)), "3_bits")
    return Outcome(found, baseline, closer)


def beats_gptq() -> Outcome:
    return beats(Gptq)


def beats_rtn() -> Outcome:
    return beats(Rtn)


_PAPER = method_info("lq_lora").paper
_RANK = f"ref, rank {RANK}, at most {TURNS} turns, {SETTING}"
_RULE = "Holds if the paired 95 % interval of the difference in KL lies below zero"

CLAIMS = (
    Claim(
        "lq_lora",
        _PAPER,
        "Quantizers chosen by the integer program beat the best one for all matrices in as many bits.",
        f"{_RANK}. At 2.09 and 3.12 bits against NF2 and NF3 in blocks of 64. {_RULE} at both.",
        program_beats_uniform,
    ),
    Claim(
        "lq_lora",
        _PAPER,
        "Weighting errors by the Fisher information beats decomposing without data.",
        f"{_RANK}. At 2.09 and 3.12 bits. {_RULE} at both.",
        fisher_beats_data_free,
    ),
    Claim(
        "lq_lora",
        _PAPER,
        "Untrained, it is closer to the original than rounding to nearest in about as many bytes.",
        f"{_RANK}. At 3.12 bits, factors in float16 on top, against rtn at 3 bits in groups of 32. {_RULE}.",
        beats_rtn,
    ),
    Claim(
        "lq_lora",
        _PAPER,
        "Untrained, it is closer to the original than GPTQ in about as many bytes.",
        f"{_RANK}. At 3.12 bits, factors in float16 on top, against gptq at 3 bits in groups of 32. {_RULE}.",
        beats_gptq,
    ),
)
