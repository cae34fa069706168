"""Prediction of prose: bits per byte and perplexity, on the shipped held-out text or on a file of the user's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from trimtab.core.errors import ConfigError
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Document, Estimate, Request, Response, Score, Task
from trimtab.evaluation.tasks._prose import PIECE_CHARACTERS, held_out_prose, pieces, read_text, sample

__all__ = ["Prose"]


class Prose(Task):
    """Each piece of the text is scored on its own, its first token conditioned on BOS.

    bits_per_byte          of UTF-8 text; comparable between tokenizers
    perplexity_per_token   of this tokenizer's tokens
    Both are ratios of sums over pieces, with bootstrap intervals over pieces. A long `characters` gives long contexts.

    text         a UTF-8 file, e.g. WikiText's test.txt; None: the shipped prose
    characters   length of a piece
    """

    name: ClassVar[str] = "prose"
    summary: ClassVar[str] = "Bits per byte and perplexity on held-out prose or on your own text."
    higher_is_better: ClassVar[Mapping[str, bool]] = {"bits_per_byte": False, "perplexity_per_token": False}

    def __init__(self, text: str | Path | None = None, characters: int = PIECE_CHARACTERS) -> None:
        if characters < 1:
            raise ConfigError(f"prose: characters must be at least 1, but is {characters}.")
        self.text, self.characters = text, characters

    def documents(self, limit: int | None, seed: int) -> Sequence[Document]:
        if limit is not None and limit < 1:
            raise ConfigError(f"limit must be at least 1 document, but is {limit}.")
        text = held_out_prose() if self.text is None else read_text(self.text)
        chosen = sample(pieces(text, self.characters), limit, seed)
        return [Document(hashlib.sha256(piece.encode()).hexdigest()[:16], {"text": piece}) for piece in chosen]

    def requests(self, document: Document) -> Mapping[str, Request]:
        return {"text": Score(document.fields["text"])}

    def score(self, document: Document, responses: Mapping[str, Response]) -> Mapping[str, float | None]:
        """Of one piece: its nats, bytes and tokens, and bits per byte for paired comparison."""
        nats, size = -responses["text"].log_prob, len(document.fields["text"].encode())
        tokens = responses["text"].tokens
        return {"bits_per_byte": nats / math.log(2) / size, "nats": nats, "bytes": size, "tokens": tokens}

    def estimate(
        self, documents: Sequence[Document], values: Mapping[str, Sequence[float | None]]
    ) -> Mapping[str, Estimate]:
        nats, size, tokens = ([float(v or 0) for v in values[name]] for name in ("nats", "bytes", "tokens"))
        per_byte = statistics.ratio_of_sums([n / math.log(2) for n in nats], size)
        per_token = statistics.ratio_of_sums(nats, tokens)
        value, low, high = map(math.exp, (per_token.value, per_token.low, per_token.high))
        return {"bits_per_byte": per_byte, "perplexity_per_token": replace(per_token, value=value, low=low, high=high)}
