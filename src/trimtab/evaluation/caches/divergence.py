"""How far next-token distributions move when the history is read from a compressed cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate
from trimtab.evaluation.caches.decoding import CHUNK
from trimtab.evaluation.kl import Divergence, NextTokens, divergence
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod


@dataclass(frozen=True, slots=True)
class CacheDivergence:
    """`Divergence` of a model with a cache from the same model without, and the UTF-8 bytes of each window."""

    divergence: Divergence
    window_bytes: tuple[float, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Those of `Divergence`, and in bits per byte of text:

        bits_per_byte          of the model with the cache
        bits_per_byte_change   how much more than without, paired window by window
        """
        found = self.divergence
        bits = {"bits_per_byte": found.nats, "bits_per_byte_change": found.gold}
        return found.estimates() | {
            name: statistics.ratio_of_sums([n / math.log(2) for n in nats], self.window_bytes)
            for name, nats in bits.items()
        }


def cache_divergence(
    model: PreTrainedModel,
    method: CacheMethod,
    reference: NextTokens,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk: int = CHUNK,
) -> CacheDivergence:
    """Read the windows of `reference`, which holds this model's own predictions without a cache, through the method.

    Windows as long as the context show what a long history costs; intervals are over windows. Raises ConfigError
    if the method does not fit the model, NumericsError if the model gives NaN.
    """
    found = divergence(model, reference, cache=method, chunk=chunk)
    return CacheDivergence(found, window_bytes(reference, tokenizer or tokenizer_of(model)))


def window_bytes(windows: NextTokens, tokenizer: PreTrainedTokenizerBase) -> tuple[float, ...]:
    """UTF-8 bytes of the text of each window; a character cut by its edge counts as the three bytes of U+FFFD."""
    texts = [tokenizer.decode(row[1:].tolist(), clean_up_tokenization_spaces=False) for row in windows.tokens]
    return tuple(float(len(str(text).encode())) for text in texts)
