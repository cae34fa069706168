"""Everything that is measured of one cache method on one model, beside the model without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from trimtab.evaluation.base import TaskResult
from trimtab.evaluation.caches.attention import AttentionInputs, attention_error, replay
from trimtab.evaluation.caches.bits import cache_bits
from trimtab.evaluation.caches.decoding import CHUNK
from trimtab.evaluation.caches.divergence import cache_divergence, window_bytes
from trimtab.evaluation.caches.recall import METRIC, SETTINGS, RecallSetting, recall_by_distance
from trimtab.evaluation.client import context_length
from trimtab.evaluation.comparison import compare
from trimtab.evaluation.kl import MAX_BYTES, NextTokens
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod

LENGTH = 2048


@dataclass(frozen=True, slots=True)
class CacheReference:
    """The model without compression: what caches are measured against.

    next_tokens   its predictions on windows of text
    inputs        what its attention layers receive for the first window
    recall        its answers, by setting
    contexts, questions, seed   of the recall settings
    """

    next_tokens: NextTokens
    inputs: AttentionInputs
    recall: Mapping[RecallSetting, TaskResult]
    contexts: int
    questions: int
    seed: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        text: str | Path | None = None,
        windows: int = 6,
        length: int = LENGTH,
        recall: Sequence[RecallSetting] = SETTINGS,
        contexts: int = 4,
        questions: int = 16,
        seed: int = 0,
    ) -> CacheReference:
        """Read windows of held-out prose, or of the file `text`, and ask the recall settings.

        windows   fewer if their log-probabilities would take more than a gibibyte
        length    tokens of a window, at most the model's context
        recall    settings that do not fit the context are left out
        """
        tokenizer = tokenizer_of(model)
        length = min(length, context_length(model, tokenizer) or length)
        per_window = length * 4 * int(model.config.get_text_config().vocab_size)
        fitting = max(2, min(windows, MAX_BYTES // per_window))
        next_tokens = NextTokens.of(model, text=text, windows=fitting, length=length, seed=seed)
        inputs = AttentionInputs.of(model, next_tokens.tokens[0, :-1].tolist())
        asked = [setting for setting in recall if setting.prompt_tokens(questions) <= length]
        answers = recall_by_distance(model, None, asked, contexts=contexts, questions=questions, seed=seed)
        return cls(next_tokens, inputs, answers, contexts, questions, seed)

    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        """Its own figures, as `measure_cache` has them: bits per byte and recall."""
        sizes = window_bytes(self.next_tokens, tokenizer_of(model))
        return {
            "divergence": {"bits_per_byte": self.next_tokens.bits_per_byte(sizes).to_dict()},
            "recall": _recall(self.recall, None),
        }


def measure_cache(
    model: PreTrainedModel,
    method: CacheMethod,
    reference: CacheReference,
    *,
    bits_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """All figures of a method, as JSON values.

    bits_dtype   precision of keys and values for the count of bits; None: that of the model

    "bits": see `CacheBits`, after one window. "divergence": estimates by name. "recall": for each setting an estimate,
    with the paired difference from the model without a cache. "attention": see `AttentionError`.
    """
    cache = method.new(model)
    replay(cache, reference.inputs if bits_dtype is None else reference.inputs.to(bits_dtype), chunk=chunk)
    divergence = cache_divergence(model, method, reference.next_tokens, chunk=chunk)
    error = attention_error(model, method, [reference.inputs], chunk=chunk)
    recall = recall_by_distance(
        model,
        method,
        tuple(reference.recall),
        contexts=reference.contexts,
        questions=reference.questions,
        seed=reference.seed,
        chunk=chunk,
    )
    return {
        "bits": cache_bits(cache).to_dict(),
        "divergence": {name: estimate.to_dict() for name, estimate in divergence.estimates().items()},
        "attention": error.to_dict(),
        "recall": _recall(recall, reference.recall),
    }


def _recall(
    results: Mapping[RecallSetting, TaskResult], reference: Mapping[RecallSetting, TaskResult] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting, result in results.items():
        found[setting.label] = result.metrics[METRIC].to_dict()
        if reference is not None:
            paired = compare({"recall": reference[setting]}, {"recall": result})
            change = next(entry.difference for entry in paired if entry.metric == METRIC)
            found[setting.label]["change"] = change.to_dict()
    return found
