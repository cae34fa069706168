"""How much likelier a text is to a tuned model than to the same model before: the reward that tuning has taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import NumericsError
from trimtab.decoding._loop import Text
from trimtab.decoding._reader import Reader

_UNSETTLED = 4
"""Last tokens of a text that its next words may join."""
_CHARACTER_TOKENS = 3
"""A character has at most four bytes, so this many tokens may be the beginning of one."""
_INCOMPLETE = "\ufffd"
_CONTEXT = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and what was written after it, as a model reads them.

    start   index of the first token that is scored: the first of what was written, but never the first of all
    """

    ids: list[int]
    start: int


class TokenCoder:
    """For a model with the tokens of the one that writes: reads them as they are."""

    unsettled = 0

    def __call__(self, text: Text) -> Encoded:
        return Encoded(text.tokens, len(text.tokens) - len(text.new))


class TextCoder:
    """For a model with other tokens, or another prompt: reads the text as its own tokenizer spells it.

    Special tokens are left out; the end-of-text token comes after a text that a stop token has ended, so that ending is
    scored. An incomplete character at the end waits for its other bytes.

    tokenizer   of the model that scores
    template    its prompt, with `{prompt}` where that of the writing model belongs
    writer      tokenizer of the model that writes
    """

    unsettled = _UNSETTLED

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, writer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._writer = writer

    def __call__(self, text: Text) -> Encoded:
        prompt = text.tokens[: len(text.tokens) - len(text.new)]
        asked = self._template.replace("{prompt}", self._decode(prompt))
        alone, whole = self._encode(asked), self._encode(asked + self.written(prompt, text))
        eos = self._tokenizer.eos_token_id
        if text.finish == "stop_token" and eos is not None:
            whole.append(int(eos))
        return Encoded(whole, max(1, _common(alone, whole)))

    def written(self, prompt: Sequence[int], text: Text) -> str:
        """What was written, up to the last complete character of a text that goes on.

        Some tokenizers drop the space of a first token, so a few of the prompt are decoded with it.
        """
        before = list(prompt[-_CONTEXT:])
        begin = len(self._decode(before))
        whole = self._decode([*before, *text.new])[begin:]
        if text.finish is not None:
            return whole
        for held in range(min(_CHARACTER_TOKENS, len(text.new)) + 1):
            found = self._decode([*before, *text.new[: len(text.new) - held]])[begin:]
            if not found.endswith(_INCOMPLETE):
                return found
        return whole

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._writer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])


@dataclass
class _Read:
    """What a model has read of one text and keeps.

    after    [V] log-probabilities of the token after it; None for a prompt, which is read without
    known    log-probabilities of its last tokens, from index `first` on
    """

    tokens: list[int]
    first: int
    after: Tensor | None = None
    known: list[float] = field(default_factory=list)

    def begins(self, encoded: Encoded) -> bool:
        """The text goes on from here, and everything to be scored is known or still to come."""
        return encoded.ids[: len(self.tokens)] == self.tokens and encoded.start >= self.first

    def copy(self) -> _Read:
        return _Read(list(self.tokens), self.first, self.after, list(self.known))


class Likelihood:
    """Log-probability of what was written after prompts, read as it grows.

    Where a tokenizer spells the beginning of a grown text in other tokens than before, all texts are read anew.

    new_reader   a reader for so many texts
    coder        a text -> the tokens that this model reads
    """

    def __init__(self, new_reader: Callable[[int], Reader], coder: TokenCoder | TextCoder) -> None:
        self._new_reader = new_reader
        self._coder = coder
        self._reader: Reader | None = None
        self._reads: list[_Read] = []
        self._forwards = 0

    @property
    def forwards(self) -> int:
        return self._forwards + (self._reader.forwards if self._reader else 0)

    def start(self, texts: Sequence[Text]) -> None:
        self._begin([self._coder(text) for text in texts])

    def _begin(self, encoded: Sequence[Encoded]) -> None:
        self._forwards = self.forwards
        self._reader = self._new_reader(len(encoded))
        heads = [own.ids[: max(0, own.start - 1 - self._coder.unsettled)] for own in encoded]
        self._reader.prefill(heads)
        self._reads = [_Read(list(head), len(head) + 1) for head in heads]

    def select(self, rows: Sequence[int]) -> None:
        assert self._reader is not None, "start comes first"
        self._reader.select(rows)
        self._reads = [self._reads[row].copy() for row in rows]

    def __call__(self, texts: Sequence[Text]) -> list[tuple[float, int]]:
        """Natural log-probability of each text's written part, and its tokens.

        Raises NumericsError for a model that gives NaN.
        """
        encoded = [self._coder(text) for text in texts]
        if not all(read.begins(own) for read, own in zip(self._reads, encoded, strict=True)):
            self._begin(encoded)
        assert self._reader is not None, "start comes first"
        pending = [own.ids[len(read.tokens) :] for read, own in zip(self._reads, encoded, strict=True)]
        rows = self._reader.read(pending, [list(range(-1, len(own) - 1)) for own in pending])
        found, kept = [], []
        for read, own, new, answers in zip(self._reads, encoded, pending, rows, strict=True):
            log_probs = answers.logits.log_softmax(dim=-1)
            afters = [read.after, *log_probs]
            values = [float(after[token]) for after, token in zip(afters, new, strict=False) if after is not None]
            scored = [*read.known, *values][own.start - read.first :]
            total = sum(scored)
            if total != total:
                raise NumericsError(f"the model that scores gives NaN for the text {own.ids[:8]}...")
            found.append((total, len(scored)))
            count = max(0, len(new) - self._coder.unsettled)
            kept.append(list(range(count)))
            if count:
                skipped = read.after is None
                read.known += values[: count - skipped]
                read.tokens += new[:count]
                read.after = log_probs[count - 1].clone()
        self._reader.commit(kept)
        return found


class LogRatio:
    """log p_tuned - log p_untuned of what was written, a sum over its tokens.

    normalise   the mean over tokens instead, each model's own
    """

    def __init__(self, tuned: Likelihood, untuned: Likelihood, *, normalise: bool = False) -> None:
        self._both = (tuned, untuned)
        self._normalise = normalise

    @property
    def forwards(self) -> int:
        return sum(each.forwards for each in self._both)

    def start(self, texts: Sequence[Text]) -> None:
        for each in self._both:
            each.start(texts)

    def score(self, texts: Sequence[Text]) -> list[float]:
        tuned, untuned = ([self._value(*found) for found in each(texts)] for each in self._both)
        return [a - b for a, b in zip(tuned, untuned, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        for each in self._both:
            each.select(rows)

    def _value(self, total: float, tokens: int) -> float:
        return total / max(1, tokens) if self._normalise else total


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
