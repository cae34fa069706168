"""Settings of one generation, and drawing from distributions with a generator for each text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What turns logits into the distribution that tokens are drawn from, and when to stop.

    temperature          0: always the likeliest token, of several the one with the lowest id
    top_k                only so many likeliest tokens; 0: all
    top_p                only the likeliest tokens that together reach this probability; 1: all
    min_p                only tokens with at least this share of the likeliest one's probability; 0: all
    repetition_penalty   logits of tokens in the text are divided by this if positive, multiplied if negative; 1: none
    max_new_tokens       stop after so many
    stop_tokens          ids that end a text; they are part of it
    stop_strings         texts that end a text, which then ends with the token that completes one
    seed                 row i draws from a generator seeded with this and i, whatever the other rows are

    Raises ConfigError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 100
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    def at(self, temperature: float) -> Sampling:
        """The same settings at another temperature."""
        return replace(self, temperature=temperature)

    def generators(self, rows: int) -> list[torch.Generator]:
        """One for each row."""
        return [torch.Generator().manual_seed(self.seed * 1_000_003 + row) for row in range(rows)]


def draw(probs: Tensor, generator: torch.Generator) -> int:
    """One token of [V], which need not sum to one; one of probability zero is never drawn."""
    cumulative = probs.cpu().numpy().cumsum(dtype=np.float64)
    total = float(cumulative[-1])
    return int(cumulative.searchsorted(min(uniform(generator) * total, math.nextafter(total, 0.0)), side="right"))


def uniform(generator: torch.Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [V], negative ones taken as zero, as a distribution; `otherwise` where nothing is left of them."""
    weights = weights.clamp_min(0)
    total = weights.sum()
    return weights / total if float(total) > 0 else otherwise


def probabilities(logits: Tensor) -> Tensor:
    """softmax [n, V] in float32. Raises NumericsError if a row holds NaN, or no token that is possible."""
    return _checked(torch.softmax(logits.float(), dim=-1), logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax [n, V] in float32, -inf for what is impossible. Raises NumericsError like `probabilities`."""
    return _checked(torch.log_softmax(logits.float(), dim=-1), logits)


def _checked(found: Tensor, logits: Tensor) -> Tensor:
    if bool(torch.isnan(found).any()):
        row = int(torch.isnan(found).any(-1).nonzero()[0])
        what = "NaN" if bool(torch.isnan(logits[row]).any()) else "no possible token"
        raise NumericsError(f"the model's logits after token {row} of a draft hold {what}; nothing can be drawn.")
    return found


def cut_at(tokens: Sequence[int], stops: Sequence[int]) -> int | None:
    """Number of tokens up to the first stop token, which counts; None if there is none."""
    return next((place + 1 for place, token in enumerate(tokens) if token in stops), None)
