"""Claims of GEAR: it recovers what its backbone loses, and its low rank helps the output of attention."""

from __future__ import annotations

from trimtab.cache import Gear, GearL, Kivi
from trimtab.claims._caches import MEASURED, closer, figures, key_errors_of_a_prompt, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]

GROUP, FINER = 64, 32


def repairs_its_backbone() -> Outcome:
    gear = measured(Gear(bits=2), "activations")
    backbone = measured(Kivi(bits=2, group_size=GROUP, window=GROUP), "activations")
    return Outcome(
        measured=figures("gear_2", gear),
        baseline=figures("backbone_2", backbone),
        holds=closer(gear, backbone),
    )


def low_rank_beats_smaller_groups_on_keys() -> Outcome:
    rank = GearL(bits=2, group_size=GROUP, buffer=GROUP, prefill_rank_keys=2, prefill_rank_values=0)
    errors, bits = key_errors_of_a_prompt(rank)
    plain_errors, plain_bits = key_errors_of_a_prompt(Kivi(bits=2, group_size=FINER, window=FINER))
    return Outcome(
        measured={"key_output_error_low_rank": errors, "key_bits_per_element_low_rank": bits},
        baseline={"key_output_error_smaller_groups": plain_errors, "key_bits_per_element_smaller_groups": plain_bits},
        holds=errors < plain_errors and bits <= plain_bits * 1.02,
    )


_PAPER = method_info("gear").paper

CLAIMS = (
    Claim(
        "gear",
        _PAPER,
        "Low rank and outliers recover most of what 2-bit quantization loses (up to 24 % average accuracy over the "
        "best "
        "baseline).",
        f"ref with outlier channels, 2 bits, groups of {GROUP}, buffer of {GROUP}, {MEASURED}. Holds if KL is smaller "
        "(paired 95 % interval) than that of the same backbone alone, the baseline. Bytes are not equal here.",
        repairs_its_backbone,
    ),
    Claim(
        "gear",
        _PAPER,
        "At equal bytes the low-rank part lowers the error of the attention output that keys cause, because softmax "
        "does "
        "not average away what many tokens have in common.",
        f"ref, keys of a prompt of 1,024 tokens at 2 bits, seen by the next 1,024: groups of {GROUP} and rank 2 "
        f"against "
        f"groups of {FINER} without, the baseline. Holds if the relative error of the attention output, mean over "
        f"layers, is "
        "smaller at the same bits per element (2 % tolerance).",
        low_rank_beats_smaller_groups_on_keys,
    ),
)
