"""From requests to token sequences: joint encoding, windows, and forward passes that serve several requests.

Likelihood rules: context and continuation are encoded together and split where the context alone ends; trailing spaces
of the context go to the continuation, because byte-pair tokenizers attach a space to the word that follows. Where the
encoding of the context is not a prefix of the joint one, the two are encoded one by one, and that is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of which `ids[start:]` are scored, each given all before it. `start` is at least 1.

    request   index of the request this belongs to (a long text has several)
    ends      the argmax after the last token is wanted too
    """

    request: int
    ids: tuple[int, ...]
    start: int
    ends: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model must read: the last token only if its successor is wanted."""
        return self.ids if self.ends else self.ids[:-1]


@dataclass(slots=True)
class Forward:
    """One row of a forward pass: its tokens, and everything that is read from its logits."""

    inputs: tuple[int, ...]
    served: list[Scored]


class Encoder:
    """A tokenizer with the project's rules of encoding.

    piecewise   counts continuations whose joint encoding did not begin with that of their context
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.piecewise = 0
        self._prefix = [t for t in tokenizer("", add_special_tokens=True)["input_ids"] if t == tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        """Tokens of the text alone, no special ones added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, begun with BOS if this tokenizer begins texts so; an empty prompt always has one."""
        return (self._prefix + self.ids(text)) or [self.start_token]

    @property
    def start_token(self) -> int:
        """What stands before the first token of a text: BOS, or end-of-text where a model has no BOS."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(
            f"{type(self.tokenizer).__name__} has neither a BOS nor an EOS token, so the first token of a text cannot "
            "be scored. Set tokenizer.bos_token."
        )

    def continuation(self, request: int, context: str, continuation: str, ends: bool) -> Scored:
        """Encode jointly and split. Raises DataError for an empty continuation."""
        if not continuation:
            raise DataError(f"log-likelihood of an empty continuation (context ends in {context[-40:]!r}).")
        bare = context.rstrip(" ")
        continuation = context[len(bare) :] + continuation
        head = self.ids(bare) if bare else []
        joint = self.ids(bare + continuation)
        if joint[: len(head)] != head or len(joint) == len(head):
            self.piecewise += 1
            joint = head + self.ids(continuation)
        prefix = self._prefix or ([] if head else [self.start_token])
        return Scored(request, tuple(prefix + joint), len(prefix) + len(head), ends)

    def windows(self, request: int, text: str, window: int, stride: int) -> list[Scored]:
        """Cut a text so that each token is scored once, the first given BOS, later ones at least window - stride.

        The last window reaches back as far as it can, so it has the full context too.
        """
        if not 1 <= stride <= window:
            raise ConfigError(f"scoring stride must be in [1, window = {window}], but is {stride}.")
        ids = (self.start_token, *self.ids(text))
        parts, begin, done = [], 0, 1
        while done < len(ids):
            end = min(begin + window + 1, len(ids))
            begin = max(0, end - 1 - window)
            parts.append(Scored(request, ids[begin:end], done - begin))
            begin, done = end - 1 - (window - stride), end
        return parts


def forwards(items: Sequence[Scored]) -> list[Forward]:
    """The fewest rows that serve all items: inputs that begin another row's inputs are read from that row.

    Choices of one token after the same context cost one row, and so do questions asked one after another in one text.
    """
    rows: list[Forward] = []
    # In lexicographic order, all sequences between a prefix and its extension begin with the prefix too.
    for item in sorted(items, key=lambda item: item.inputs, reverse=True):
        if rows and rows[-1].inputs[: len(item.inputs)] == item.inputs:
            rows[-1].served.append(item)
        else:
            rows.append(Forward(item.inputs, [item]))
    return rows


def batches(rows: Sequence[Forward], batch_tokens: int, batch_rows: int | None = None) -> Iterator[list[Forward]]:
    """Rows of similar length together, at most `batch_tokens` with padding (one row at least), longest first."""
    batch: list[Forward] = []
    for row in sorted(rows, key=lambda row: len(row.inputs), reverse=True):
        if batch and (len(batch[0].inputs) * (len(batch) + 1) > batch_tokens or len(batch) == batch_rows):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
