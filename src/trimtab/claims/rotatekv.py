"""Claims of RotateKV: rotation and order of channels make large groups usable at 2 bits."""

from __future__ import annotations

from trimtab.cache import RotateKV
from trimtab.claims._caches import MEASURED, NotRotated, closer, figures, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]

GROUP = 64


def beats_no_rotation() -> Outcome:
    rotated = measured(RotateKV(bits=2, group_size=GROUP), "activations")
    plain = measured(NotRotated(bits=2, group_size=GROUP), "activations")
    unordered = measured(RotateKV(bits=2, group_size=GROUP, reorder=False), "activations")
    return Outcome(
        measured=figures("rotatekv_2", rotated) | figures("rotated_in_the_old_order", unordered),
        baseline=figures("not_rotated", plain),
        holds=closer(rotated, plain),
    )


def order_helps() -> Outcome:
    rotated = measured(RotateKV(bits=2, group_size=GROUP), "activations")
    unordered = measured(RotateKV(bits=2, group_size=GROUP, reorder=False), "activations")
    return Outcome(
        measured={"key_output_error_ordered": rotated.key_error, "kl_nats_per_token_ordered": rotated.kl},
        baseline={"key_output_error_unordered": unordered.key_error, "kl_nats_per_token_unordered": unordered.kl},
        holds=rotated.key_error < unordered.key_error and rotated.kl < unordered.kl,
    )


_PAPER = method_info("rotatekv").paper

CLAIMS = (
    Claim(
        "rotatekv",
        _PAPER,
        "Rotated before rotary embedding and sorted, keys can be quantized per token at 2 bits in large groups (less "
        "than "
        "0.3 perplexity on LLaMA-2-13B).",
        f"ref with outlier channels, 2 bits, groups of {GROUP}, {MEASURED}. Holds if KL is smaller (paired 95 % "
        f"interval) "
        "than without rotation and order, everything else equal, the baseline.",
        beats_no_rotation,
    ),
    Claim(
        "rotatekv",
        _PAPER,
        "After the rotation, channels sorted by their level quantize better than in their old order.",
        f"ref with outlier channels, 2 bits, groups of {GROUP}, {MEASURED}. Holds if the error of the attention "
        f"output that "
        "keys cause, and KL, are smaller than in the old order, the baseline.",
        order_helps,
    ),
)
