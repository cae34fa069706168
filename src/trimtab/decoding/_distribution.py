"""Which distribution is decoded: logit transforms in their order, then the softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimtab.decoding._reader import Rows
from trimtab.decoding._sampling import Sampling, log_probabilities, probabilities
from trimtab.models.early_exits import Exit

Prefixes = Callable[[int], Sequence[int]]
"""Row -> all tokens of the text up to and with the one that the row follows, drafted ones included."""


class LogitsTransform(Protocol):
    """One step from what models say to what is drawn from. Pure: no chance, no memory, one row at a time.

    exits   whose answers it reads in `Rows.early`
    """

    exits: tuple[Exit, ...]

    def __call__(self, logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        """logits [n, V] float32 of the steps before -> [n, V] float32; -inf is impossible."""


class Warp:
    """Repetition penalty, temperature, top-k, top-p and min-p of `Sampling`, in this order, as transformers has it.

    Temperature 0 leaves the likeliest token alone; of equals the one with the lowest id.
    """

    exits: tuple[Exit, ...] = ()

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        asked = self.sampling
        if asked.repetition_penalty != 1:
            logits = _penalised(logits, prefixes, asked.repetition_penalty)
        if asked.temperature == 0:
            return _only_best(logits)
        if asked.temperature != 1:
            logits = logits / asked.temperature
        if 0 < asked.top_k < logits.shape[-1]:
            limit = logits.topk(asked.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < limit, -torch.inf)
        if asked.top_p < 1:
            logits = _nucleus(logits, asked.top_p)
        if asked.min_p > 0:
            probs = torch.softmax(logits, dim=-1)
            limit = asked.min_p * probs.max(dim=-1, keepdim=True).values
            logits = logits.masked_fill(probs < limit, -torch.inf)
        return logits


def _penalised(logits: Tensor, prefixes: Prefixes, penalty: float) -> Tensor:
    seen = [set(prefixes(row)) for row in range(len(logits))]
    rows = torch.tensor([row for row, own in enumerate(seen) for _ in own], dtype=torch.long, device=logits.device)
    tokens = torch.tensor([token for own in seen for token in own], dtype=torch.long, device=logits.device)
    found = logits[rows, tokens]
    return logits.index_put((rows, tokens), torch.where(found > 0, found / penalty, found * penalty))


def _only_best(logits: Tensor) -> Tensor:
    best = logits.max(dim=-1, keepdim=True)
    lowest = (logits == best.values).int().argmax(dim=-1, keepdim=True)
    kept = torch.full_like(logits, -torch.inf).scatter_(-1, lowest, 0.0)
    return torch.where(torch.isnan(best.values), logits, kept)  # NaN is for `probabilities` to report


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


class Distribution:
    """Transforms and then a softmax: rows of a model -> probabilities [n, V] float32."""

    def __init__(self, transforms: Sequence[LogitsTransform]) -> None:
        self.transforms = tuple(transforms)

    @property
    def exits(self) -> tuple[Exit, ...]:
        """All that the transforms read."""
        return tuple(sorted({place for transform in self.transforms for place in transform.exits}))

    def __call__(self, rows: Rows, prefixes: Prefixes) -> Tensor:
        return probabilities(self._transformed(rows, prefixes))

    def log_probs(self, rows: Rows, prefixes: Prefixes) -> Tensor:
        """The same as logarithms, [n, V] float32: these do not underflow."""
        return log_probabilities(self._transformed(rows, prefixes))

    def _transformed(self, rows: Rows, prefixes: Prefixes) -> Tensor:
        logits = rows.logits
        for transform in self.transforms:
            logits = transform(logits, rows, prefixes)
        return logits

    def of_each(self, rows: Sequence[Rows], prefixes: Callable[[int, int], Sequence[int]]) -> list[Tensor]:
        """The same for the rows of several texts, in one go. prefixes: (text, row) -> tokens."""
        places = [(text, row) for text, own in enumerate(rows) for row in range(len(own))]
        probs = self(Rows.joined(rows), lambda i: prefixes(*places[i]))
        return list(torch.split(probs, [len(own) for own in rows]))
