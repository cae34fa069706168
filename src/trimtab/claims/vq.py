"""Claims of additive quantization: shared vectors beat a grid at two bits, and fitting them to the output is why."""

from __future__ import annotations

from trimtab.claims._reference import SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Gptq, Vq

__all__ = ["CLAIMS"]


def beats_gptq_in_fewer_bytes() -> Outcome:
    vq, gptq = measured(Vq(bits=2)), measured(Gptq(bits=2))
    high = vq.divergence.kl_difference(gptq.divergence).high
    return Outcome(
        {
            "kl_nats_per_token": vq.kl,
            "kl_difference_high": high,
            "bits_per_weight": vq.bits_per_weight,
            "bytes_at_rest": vq.bytes_at_rest,
        },
        {
            "gptq_kl_nats_per_token": gptq.kl,
            "gptq_bits_per_weight": gptq.bits_per_weight,
            "gptq_bytes_at_rest": gptq.bytes_at_rest,
        },
        holds=high < 0 and vq.bytes_at_rest <= gptq.bytes_at_rest,
    )


def fitting_beats_k_means() -> Outcome:
    vq, k_means = measured(Vq(bits=2)), measured(Vq(bits=2, data_free=True))
    high = vq.divergence.kl_difference(k_means.divergence).high
    return Outcome(
        {"kl_nats_per_token": vq.kl, "kl_difference_high": high, "bytes_at_rest": vq.bytes_at_rest},
        {"k_means_kl_nats_per_token": k_means.kl, "k_means_bytes_at_rest": k_means.bytes_at_rest},
        holds=high < 0 and vq.bytes_at_rest == k_means.bytes_at_rest,
    )


_PAPER = method_info("vq").paper

CLAIMS = (
    Claim(
        "vq",
        _PAPER,
        "At 2 bits codebooks stay closer to the original model than GPTQ's grid, in no more bytes.",
        f"ref at 2 bits, codebooks counted, {SETTING}. Holds if the paired 95 % interval of the difference in KL to "
        "gptq lies below zero and the model takes no more bytes.",
        beats_gptq_in_fewer_bytes,
    ),
    Claim(
        "vq",
        _PAPER,
        "Fitting codebooks and codes to the output of the layer beats k-means of its weights.",
        f"ref at 2 bits, {SETTING}. Holds if at the same bytes the paired 95 % interval of the difference in KL to "
        "k-means alone (data_free) lies below zero.",
        fitting_beats_k_means,
    ),
)
