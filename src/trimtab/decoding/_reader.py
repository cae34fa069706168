"""What reads texts: a model with a cache behind one interface that trees, drafts and tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import CompositionError, DataError
from trimtab.decoding._tree import ROOT
from trimtab.models.early_exits import EarlyExits, Exit
from trimtab.models.segments import SegmentCache


@dataclass(frozen=True)
class Rows:
    """What a model says after each of n tokens of one text.

    logits   [n, V] float32
    early    exit -> [n, V] float32, the head's answer there, where it was asked for
    others   name -> [n, V] float32, the logits of other models that read the same, where there are any
    """

    logits: Tensor
    early: Mapping[Exit, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logits)

    def split(self, lengths: Sequence[int]) -> list[Rows]:
        """So many rows each: the inverse of `joined`."""
        logits = torch.split(self.logits, list(lengths))
        early = {layer: torch.split(rows, list(lengths)) for layer, rows in self.early.items()}
        others = {name: torch.split(rows, list(lengths)) for name, rows in self.others.items()}
        return [
            Rows(
                own, {layer: rows[i] for layer, rows in early.items()}, {name: rows[i] for name, rows in others.items()}
            )
            for i, own in enumerate(logits)
        ]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """One after the other; all have the same layers and other models."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Rows(
            torch.cat([part.logits for part in parts]),
            {layer: torch.cat([part.early[layer] for part in parts]) for layer in first.early},
            {name: torch.cat([part.others[name] for part in parts]) for name in first.others},
        )


class Reader(Protocol):
    """A model that has read a batch of texts and may read drafts after them.

    Tokens read since the last `commit` are a draft: they see the text, the drafted tokens before them on their branch
    and themselves. `commit` keeps one branch of each text, and nothing of the others is left.
    """

    vocabulary: int
    positions: int | None
    """How long a text may become; None: without end, as with a cache that forgets, whose positions do not grow."""

    @property
    def texts(self) -> list[list[int]]:
        """What has been read and kept."""

    @property
    def forwards(self) -> int:
        """How many forward passes that took so far."""

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        """Read the beginnings of all texts, which may be empty, and keep them. Comes first, and once.

        Equal ones are read once.
        """

    def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[Rows]:
        """Read more drafted tokens of each text, all in one forward pass.

        parents   for each token the index of the one before it among the text's drafted tokens, ROOT for the text
        """

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep of each text's drafted tokens those of a path, given by their indices."""

    def select(self, rows: Sequence[int]) -> None:
        """Make text i what text rows[i] was; some may be left out and some come twice."""


class ModelReader:
    """A transformers model as a Reader. Its cache is transactional, so any method of the cache room will do.

    exits   where the model answers early as well; the head alone, without what a family does to its final logits

    Raises DataError for a token after the last position that the model has, and CompositionError for a cache that
    cannot take drafted tokens back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        new_cache: Callable[[PreTrainedModel], SegmentCache],
        exits: Sequence[Exit] = (),
    ) -> None:
        self.model = model
        self.cache = new_cache(model)
        if not isinstance(self.cache, SegmentCache):
            raise CompositionError(
                f"a {type(self.cache).__name__} cannot hold a draft and take it back; use one of trimtab.cache, "
                "such as Kivi(bits=4).new."
            )
        self._exits = EarlyExits(model, exits) if exits else None
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.positions = self.cache.positions
        self.forwards = 0
        self._drafts = [_Draft() for _ in range(rows)]
        self._columns = 0  # of all drafts, padding included

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        assert not any(self.texts), "a text begins once"
        different = list(dict.fromkeys(map(tuple, texts)))
        width = max(map(len, different))
        if width:
            ids, seen = (torch.zeros((len(different), width), dtype=torch.long) for _ in range(2))
            for row, text in enumerate(different):
                ids[row, : len(text)] = torch.tensor(text, dtype=torch.long)
                seen[row, : len(text)] = 1
            device = self.model.device
            padded = any(len(text) < width for text in different)
            with torch.inference_mode():
                self.model(
                    input_ids=ids.to(device),
                    attention_mask=seen.to(device) if padded else None,
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            self.forwards += 1
            if len(different) < len(texts):
                places = {text: place for place, text in enumerate(different)}
                self.cache.reorder([places[tuple(text)] for text in texts])
        self.texts = [list(text) for text in texts]

    def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list[Rows]:
        if not self.cache.in_transaction:
            self.cache.begin()
        held = self.cache.get_seq_length() - self._columns
        width = max(map(len, tokens))
        ids = torch.zeros((len(tokens), width), dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, (own, before) in enumerate(zip(tokens, parents, strict=True)):
            self._drafts[row].add(own, before, self._columns)
            depths = self._drafts[row].depths[len(self._drafts[row].depths) - len(own) :] if own else []
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.long)
            positions[row, : len(own)] = torch.tensor(depths, dtype=torch.long) + len(self.texts[row])
        self.cache.check_length(int(positions.max()) + 1)
        self._columns += width
        mask = self._mask(held, width)
        device = self.model.device
        with torch.inference_mode(), self._early() as early:
            output = self.model(
                input_ids=ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.forwards += 1
        logits = output.logits.float()
        return [
            Rows(logits[row, : len(own)], {place: found[row, : len(own)].float() for place, found in early.items()})
            for row, own in enumerate(tokens)
        ]

    def _early(self) -> AbstractContextManager[Mapping[Exit, Tensor]]:
        return nullcontext({}) if self._exits is None else self._exits.listening()

    def _mask(self, held: int, width: int) -> Tensor | None:
        """bool [R, 1, width, held + drafted columns]; None where every token sees all before it."""
        drafts = self._drafts
        if len(drafts) == 1 and drafts[0].is_chain and (width == 1 or (held == 0 and width == self._columns)):
            return None
        mask = torch.zeros((len(drafts), 1, width, held + self._columns), dtype=torch.bool)
        for row, draft in enumerate(drafts):
            draft.fill(mask[row, 0], held, self._columns - width)
        return mask

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        self.cache.commit([[self._drafts[row].columns[i] for i in path] for row, path in enumerate(paths)])
        for row, path in enumerate(paths):
            self.texts[row] += [self._drafts[row].tokens[i] for i in path]
            self._drafts[row] = _Draft()
        self._columns = 0

    def select(self, rows: Sequence[int]) -> None:
        assert not self.cache.in_transaction, "texts are chosen between drafts"
        self.cache.reorder(list(rows))
        self.texts = [list(self.texts[row]) for row in rows]
        self._drafts = [_Draft() for _ in rows]


class _Draft:
    """Drafted tokens of one text: where they are among the columns of the cache, and what each of them sees."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.columns: list[int] = []
        self.depths: list[int] = []
        self.is_chain = True
        self._sees: list[list[int]] = []  # columns, its own included

    def add(self, tokens: Sequence[int], parents: Sequence[int], column: int) -> None:
        for offset, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            index = len(self.tokens)
            if not ROOT <= parent < index:
                raise DataError(f"drafted token {index} follows token {parent}, which does not come before it.")
            self.is_chain &= parent == index - 1
            self.tokens.append(token)
            self.columns.append(column + offset)
            self.depths.append(0 if parent == ROOT else self.depths[parent] + 1)
            self._sees.append([*([] if parent == ROOT else self._sees[parent]), column + offset])

    def fill(self, mask: Tensor, held: int, before: int) -> None:
        """Mark in mask [width, held + columns] what the tokens read last see: those in columns from `before` on."""
        for column, seen in zip(self.columns, self._sees, strict=True):
            if column >= before:
                mask[column - before, :held] = True
                mask[column - before, torch.tensor(seen) + held] = True
