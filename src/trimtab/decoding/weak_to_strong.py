"""Steer a large model by what tuning taught a small one: sample chunks, keep the texts that the tuned one prefers.

Paper: Zhanhui Zhou, Zhixuan Liu, Jie Liu, Zhichen Dong, Chao Yang, Yu Qiao, "Weak-to-Strong Search: Align Large
Language Models via Searching over Small Language Models", NeurIPS 2024, arXiv:2405.19262.

CBS(W, K, L): each of W texts is continued K times by L tokens that the large model samples; those W go on whose score

    s(y) = sum over tokens of y of log p_tuned(y_t | x, y_<t) - log p_untuned(y_t | x, y_<t)

is largest; ties go to the first. The tuned model was tuned with the untuned one as its reference, so s is the reward
that it learnt, up to a constant of the prompt, and of a beginning it is an estimate of what will follow. W = 1 with
chunks without end is the best of K samples.

The small models may have another tokenizer than the large one, and prompts of their own: then s is computed from the
text. With the same tokens and prompt it is computed from the tokens. Sampling may draft (`speculative` and the like):
the chunks are distributed alike.

Departures: a text that has ended stands once among the candidates (dedupe_finished=False: K times, as in the authors'
code). An incomplete character at the end of a chunk is scored with the next one. Temperature 0.7 and top-k 50, which
the authors use, are the caller's, in `Sampling`.

Cost: W K texts at once, whose prompt is read once, and each of their tokens once by both small models.

When it fails: s is a sum, so it favours the length that tuning favours; chunks too short to tell good from bad make the
choice arbitrary, and a text that the large model does not write among W K samples cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError
from trimtab.decoding._decoder import Decoder, exact_cache
from trimtab.decoding._loop import Generation
from trimtab.decoding._named import token_difference
from trimtab.decoding._reader import ModelReader, Reader
from trimtab.decoding._sampling import Sampling
from trimtab.decoding._search.chunks import ChunkSearch
from trimtab.decoding._search.likelihood import Likelihood, LogRatio, TextCoder, TokenCoder
from trimtab.decoding.base import DecodingMethod
from trimtab.models import tokenizer_of

__all__ = ["WeakToStrong"]

_SAME = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class WeakToStrong(DecodingMethod):
    """Chunk-level beam search guided by a tuned and an untuned small model.

    tuned             the small model after tuning, by any name that loads
    untuned           the small model before
    width             W, texts that are kept
    successors        K, continuations of each of them
    chunk             L, tokens of a continuation; 0: all, which is the best of W K samples
    normalise         score by the mean over tokens instead of the sum
    dedupe_finished   a text that has ended stands once among the candidates
    tuned_template    the tuned model's prompt; {prompt} stands for the one that the large model gets
    untuned_template  that of the untuned model
    """

    lossless: ClassVar[bool] = False

    tuned: str
    untuned: str
    width: int = 4
    successors: int = 4
    chunk: int = 5
    normalise: bool = False
    dedupe_finished: bool = True
    tuned_template: str = _SAME
    untuned_template: str = _SAME

    def check(self) -> None:
        for name, least in (("width", 1), ("successors", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("tuned_template", "untuned_template"):
            if _SAME not in getattr(self, name):
                raise ConfigError(f"{name} does not say where the prompt goes; write {_SAME} there.")

    def search(self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Generation:
        """The text with the best score for each prompt.

        Raises ConfigError for temperature 0, where all continuations of a text would be the same.
        """
        if sampling.temperature == 0 and self.width * self.successors > 1:
            raise ConfigError(
                "weak_to_strong chooses among samples, but at temperature 0 all are the same; the authors take "
                "temperature 0.7 and top_k 50."
            )
        scorer = LogRatio(
            self._likelihood(decoder, self.tuned, self.tuned_template),
            self._likelihood(decoder, self.untuned, self.untuned_template),
            normalise=self.normalise,
        )
        search = ChunkSearch(self.width, self.successors, self.chunk or None, self.dedupe_finished)
        return search.run(decoder.loop(len(prompts), sampling), scorer, prompts, sampling, decoder.decode)

    def _likelihood(self, decoder: Decoder, name: str, template: str) -> Likelihood:
        model = decoder.named(name, same_tokens=False)
        if template == _SAME and token_difference(model, decoder.model) is None:
            return Likelihood(_reader_of(model), TokenCoder())
        return Likelihood(_reader_of(model), TextCoder(tokenizer_of(model), template, tokenizer_of(decoder.model)))


def _reader_of(model: PreTrainedModel) -> Callable[[int], Reader]:
    return lambda rows: ModelReader(model, rows, exact_cache)
