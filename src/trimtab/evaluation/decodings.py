"""What decoding methods do on one model: speed, tokens per forward pass, whether the text is plain decoding's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.core.progress import progress
from trimtab.decoding import Decoder, DecodingLedger, Sampling
from trimtab.evaluation.kl import window_tokens
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.decoding.base import DecodingMethod

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 64, 64


@dataclass(frozen=True)
class DecodingReference:
    """Prompts of held-out prose, and what the model writes after each of them by plain decoding."""

    prompts: list[list[int]]
    sampling: Sampling
    texts: list[list[int]]


def decoding_reference(
    model: PreTrainedModel, *, prompts: int = PROMPTS, temperature: float = 0.0, seed: int = 0
) -> tuple[DecodingReference, dict[str, Any]]:
    """The reference, and the figures of plain decoding as `measure_decoding` gives them."""
    windows = window_tokens(model, tokenizer_of(model), None, max(2, prompts), PROMPT_TOKENS - 1, seed)
    sampling = Sampling(temperature=temperature, max_new_tokens=NEW_TOKENS, seed=seed)
    plain = DecodingReference(windows.tolist(), sampling, [])
    texts, figures = _measured(Decoder(model), plain, "plain decoding")
    return DecodingReference(plain.prompts, sampling, texts), figures


def measure_decoding(
    model: PreTrainedModel, methods: Sequence[DecodingMethod], reference: DecodingReference
) -> dict[str, Any]:
    """tokens_per_s (median over the prompts, one at a time), the sums of their ledgers, and

    same_text    share of the tokens that are plain decoding's, up to the first difference of each text; only for
                 temperature 0, where methods that lose nothing differ by the rounding of near ties at most
    lossless     whether all methods follow the distribution that the model and they define
    """
    name = "+".join(type(method).name() for method in methods)
    texts, figures = _measured(Decoder(model, methods), reference, name)
    figures["lossless"] = all(method.lossless for method in methods)
    if reference.sampling.temperature == 0:
        same = sum(equal_until(a, b) for a, b in zip(texts, reference.texts, strict=True))
        figures["same_text"] = same / sum(map(len, reference.texts))
    return figures


def _measured(decoder: Decoder, setting: DecodingReference, name: str) -> tuple[list[list[int]], dict[str, Any]]:
    decoder.generate(setting.prompts[:1], Sampling(max_new_tokens=4))  # loads drafts, touches the weights
    texts, rates, ledgers = [], [], []
    with progress(name, len(setting.prompts)) as advance:
        for prompt in setting.prompts:
            start = time.perf_counter()
            done = decoder.generate([prompt], setting.sampling)
            rates.append(len(done.tokens[0]) / (time.perf_counter() - start))
            texts.append(done.tokens[0])
            ledgers.append(done.ledger)
            advance("")
    total = DecodingLedger.sum(ledgers)
    return texts, {"tokens_per_s": statistics.median(rates), "ledger": total.to_dict()}


def equal_until(found: Sequence[int], expected: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(found, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
