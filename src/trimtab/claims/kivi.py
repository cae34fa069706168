"""Claims of KIVI: near lossless at 4 bits, keys per channel rather than per token, a fifth of the bytes."""

from __future__ import annotations

from trimtab.cache import Exact, Kivi
from trimtab.claims._caches import MEASURED, KeysPerToken, closer, figures, long_text_bytes, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]

LARGEST_LOSS = 0.005
LONG_TOKENS = 32_768


def near_lossless_at_4_bits() -> Outcome:
    four, two = measured(Kivi(bits=4)), measured(Kivi(bits=2))
    exact = four.bits_per_byte - four.bits_per_byte_change
    loss = four.bits_per_byte_change / exact
    return Outcome(
        measured=figures("kivi_4", four) | {"bits_per_byte_kivi_4": four.bits_per_byte, "relative_loss_kivi_4": loss},
        baseline=figures("kivi_2", two) | {"bits_per_byte_exact": exact},
        holds=loss < LARGEST_LOSS,
    )


def keys_per_channel() -> Outcome:
    by_channel, by_token = measured(Kivi(bits=2), "activations"), measured(KeysPerToken(bits=2), "activations")
    return Outcome(
        measured=figures("per_channel", by_channel) | {"key_output_error_per_channel": by_channel.key_error},
        baseline=figures("per_token", by_token) | {"key_output_error_per_token": by_token.key_error},
        holds=closer(by_channel, by_token) and by_channel.key_error < by_token.key_error,
    )


def a_fifth_of_the_bytes() -> Outcome:
    small = long_text_bytes(Kivi(bits=2, group_size=64), LONG_TOKENS)
    full = long_text_bytes(Exact(), LONG_TOKENS)
    return Outcome(
        measured={"kv_bytes_per_token_kivi_2": small / LONG_TOKENS, "share_of_exact": small / full},
        baseline={"kv_bytes_per_token_exact": full / LONG_TOKENS},
        holds=small <= full / 5,
    )


_PAPER = method_info("kivi").paper

CLAIMS = (
    Claim(
        "kivi",
        _PAPER,
        "Quantized to 4 bits, keys per channel and values per token, a cache is near lossless (LongBench average 38.79 "
        "against 38.72 in 16 bits).",
        f"ref, 4 bits, groups of 32, window of 128, {MEASURED}. Holds if bits per byte of text rise by less than "
        f"{LARGEST_LOSS:.1%}. Baseline: the exact cache, and 2 bits.",
        near_lossless_at_4_bits,
    ),
    Claim(
        "kivi",
        _PAPER,
        "Keys have outlier channels and want groups of tokens of one channel; groups of channels of one token, as "
        "values "
        "have, are clearly worse.",
        f"ref with outlier channels, 2 bits, groups of 32, {MEASURED}. Holds if KL (paired 95 % interval) and the "
        f"error "
        "of the attention output that keys cause are smaller than with keys per token, the baseline, at equal bytes.",
        keys_per_channel,
    ),
    Claim(
        "kivi",
        _PAPER,
        "2 bits save most of the cache's memory.",
        f"{LONG_TOKENS:,} tokens of random keys and values in the shapes of ref in bfloat16, 2 bits, groups of 64. "
        f"Holds "
        "if the allocated buffers are at most a fifth of those of the exact cache, the baseline.",
        a_fifth_of_the_bytes,
    ),
)
