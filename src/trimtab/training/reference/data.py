"""Rows of tokens for the training of the reference models.

A row has one source: prose, random segments that repeat (copying), or documents of one task of the
small world, one after the other, each between ``<|bos|>`` and ``<|eos|>``. Which source a row has, and what is
in it, depends only on the stage, the step and the row, so a resumed run continues with the very rows
that an uninterrupted one would have seen, and the shares of the sources are exact.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimtab.core.errors import DataError
from trimtab.training.reference.tokenizer import CONTEXT
from trimtab.world import recall
from trimtab.world.mixture import WRITERS
from trimtab.world.types import Document, Span

SPECIAL_TOKENS = 3
WEIGHTS = {"plain": 0.3, "answer": 3.0, "noise": 0.03}
"""Weight in the loss of a token of the small world, by the role of its span; prose has weight 1."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a stage are made.

    copy_ids        number of different token ids in random segments.
    copy_lengths    shortest and longest segment.
    recall_forms    forms of recall documents (see ``trimtab.world.recall.FORMS``).
    recall_values   kinds of values.
    recall_records  numbers of records.
    recall_filler   most tokens of prose between records and questions, in rows of 512 tokens; in
                    proportion in longer and shorter rows.
    gaps            share of recall and copy rows whose positions jump once: the tokens after the jump
                    are as far from those before it as if up to 2,048 tokens lay between. It teaches
                    long distances at the price of short rows.
    """

    copy_ids: int = 4093
    copy_lengths: tuple[int, int] = (6, 24)
    recall_forms: tuple[str, ...] = ("list", "list", "list", "sentence", "adjacent")
    recall_values: tuple[str, ...] = ("word", "word", "word", "pair", "code")
    recall_records: tuple[int, ...] = (4, 6, 8, 8, 12, 12, 16, 16, 16, 20, 24, 32, 48)
    recall_filler: int = 0
    gaps: float = 0.0


@dataclass
class Rows:
    """Makes batches; ``prose`` is one array of token ids, all training books in a row."""

    tokenizer: PreTrainedTokenizerFast | None
    prose: Ids
    _cache: dict[str, list[int]] = field(default_factory=dict)

    def batch(
        self,
        stage: str,
        step: int,
        shape: tuple[int, int],
        mixture: Mapping[str, float],
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, loss weights and positions, each [rows, tokens + 1] for ``shape`` (rows, tokens)."""
        rows, tokens = shape
        made = [
            self.row(source, random.Random(f"{stage} {step} {i}"), tokens + 1, options)
            for i, source in enumerate(sources_of(stage, step, rows, mixture))
        ]
        ids, weights, positions = (np.stack(parts) for parts in zip(*made, strict=True))
        return torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(positions)

    def row(
        self, source: str, rng: random.Random, length: int, options: RowOptions
    ) -> tuple[Ids, npt.NDArray[np.float32], Ids]:
        """One row of this source: ids, weights, positions."""
        if source == "prose":
            ids, weights = self._prose(rng, length - 1), np.ones(length, np.float32)
            ids = np.concatenate([[1], ids])
        elif source == "copy":
            ids, weights = _copies(rng, length, options)
        else:
            ids, weights = self._documents(source, rng, length, options)
        positions = np.arange(length, dtype=np.int64)
        room = CONTEXT - length
        if source in ("recall", "copy") and room > 0 and rng.random() < options.gaps:
            positions[rng.randrange(1, length) :] += rng.randrange(room)
        return ids, weights, positions

    def _prose(self, rng: random.Random, count: int) -> Ids:
        start = rng.randrange(len(self.prose) - count)
        return self.prose[start : start + count]

    def _filler(self, rng: random.Random, most: int) -> str:
        assert self.tokenizer is not None
        ids = self._prose(rng, rng.randrange(20, most))
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _documents(
        self, task: str, rng: random.Random, length: int, options: RowOptions
    ) -> tuple[Ids, npt.NDArray[np.float32]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            document = (
                self._recall(rng, options.recall_filler * length // 512, options)
                if task == "recall"
                else WRITERS[task](rng, "train")
            )
            ids.append(1)
            weights.append(0.0)
            for span in document:
                pieces = self.encode(span)
                ids += pieces
                weights += [WEIGHTS[span.role]] * len(pieces)
            ids.append(2)
            weights.append(WEIGHTS["plain"])
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)

    def _recall(self, rng: random.Random, most: int, options: RowOptions) -> Document:
        return recall.document(
            rng,
            "train",
            records=rng.choice(options.recall_records),
            filler=self._filler(rng, most) if most and rng.random() < 0.5 else "",
            form=rng.choice(options.recall_forms),
            value=rng.choice(options.recall_values),
        )

    def encode(self, span: Span) -> list[int]:
        """Token ids of a span; short spans are remembered, since they come back all the time."""
        assert self.tokenizer is not None
        known = self._cache.get(span.text)
        if known is None:
            known = self.tokenizer.encode(span.text, add_special_tokens=False)
            if len(span.text) < 24:
                self._cache[span.text] = known
        return known


def sources_of(stage: str, step: int, rows: int, mixture: Mapping[str, float]) -> list[str]:
    """The source of each row of a step: a fixed shuffled cycle of 200 rows with exact shares."""
    bounds = list(accumulate(mixture.values()))
    names = list(mixture)
    cycle = [
        next(n for n, b in zip(names, bounds, strict=True) if (i + 0.5) / 200 * bounds[-1] <= b) for i in range(200)
    ]
    random.Random(f"{stage} sources").shuffle(cycle)
    return [cycle[(step * rows + i) % len(cycle)] for i in range(rows)]


def _copies(rng: random.Random, length: int, options: RowOptions) -> tuple[Ids, npt.NDArray[np.float32]]:
    """A random segment, repeated to the end of the row; the loss is on the repeats alone."""
    size = min(rng.randint(*options.copy_lengths), length // 2)
    segment = [SPECIAL_TOKENS + rng.randrange(options.copy_ids) for _ in range(size)]
    ids = (segment * (length // size + 1))[:length]
    weights = np.ones(length, np.float32)
    weights[: size + 1] = 0.0
    return np.array(ids, np.int64), weights


def training_books(folder: Path, held_out: Iterable[str]) -> list[Path]:
    """The plain-text books of a folder without those that are held out, in a fixed order."""
    held = set(held_out)
    books = [path for path in sorted(folder.glob("*.txt")) if path.stem not in held]
    if not books:
        raise DataError(f"no training book (*.txt) in {folder}")
    return books


def tokenize_prose(tokenizer: PreTrainedTokenizerFast, books: Iterable[Path]) -> Ids:
    """All books in a row, separated by ``<|eos|>``."""
    ids: list[int] = []
    for book in books:
        text = book.read_text(encoding="utf-8")
        ids += tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids.append(2)
    return np.array(ids, np.int64)
