"""The contrast of a model's last layer with an early one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.decoding._distribution import Prefixes
from trimtab.decoding._reader import Rows
from trimtab.models.early_exits import Exit

Bucket = Literal["low", "high"]
Divergence = Literal["true", "official"]
_DEEP = 40
_BUCKET = 20
_TINY = 1e-38
_LOG_TINY = math.log(_TINY)
"""Where a probability is zero, so that 0 log 0 is 0."""


class DolaTransform:
    """log q_N - log q_M for tokens that the last layer N finds plausible, -inf for all others.

    M is, for each row on its own, the exit whose distribution is farthest from the last layer's: of equals the
    earliest. With one exit nothing is chosen.

    exits          the candidates
    relative_top   plausible is a token with at least this share of the likeliest one's probability; 0: all are
    divergence     "true": Jensen-Shannon; "official": what the authors' code computes, where each distribution and
                   their mean have changed places
    """

    def __init__(self, exits: Sequence[Exit], relative_top: float = 0.1, divergence: Divergence = "true") -> None:
        self.exits = tuple(sorted(set(exits)))
        self.relative_top = relative_top
        self.divergence = divergence

    def __call__(self, logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        answers = torch.stack([*(rows.early[place] for place in self.exits), logits])
        *early, mature = log_probs = torch.log_softmax(answers, dim=-1)  # [J + 1, n, V]
        premature = early[0]
        if len(early) > 1:
            farthest = distances(log_probs, self.divergence).argmax(dim=0)
            premature = log_probs[farthest, torch.arange(len(mature), device=mature.device)]
        contrast: Tensor = mature - premature
        if self.relative_top == 0:
            return contrast
        limit = mature.max(dim=-1, keepdim=True).values + math.log(self.relative_top)
        return contrast.masked_fill(mature < limit, -torch.inf)


def distances(log_probs: Tensor, divergence: Divergence) -> Tensor:
    """[J, n] in nats, of all but the last of log-probabilities [J + 1, n, V] from the last."""
    probs = log_probs.exp()
    mean = (probs[:-1] + probs[-1]) / 2
    log_mean = mean.clamp_min(_TINY).log()
    if divergence == "true":
        negative_entropy = (probs * log_probs.clamp_min(_LOG_TINY)).sum(-1)
        found = (negative_entropy[:-1] + negative_entropy[-1]) / 2 - (mean * log_mean).sum(-1)
    else:
        found = (mean * (log_mean - (log_probs[:-1] + log_probs[-1]) / 2)).nan_to_num(nan=0.0).sum(-1)
    return found


def bucket(name: Bucket, blocks: int, *, tied: bool) -> tuple[int, ...]:
    """Candidate blocks for a model of so many, as transformers chooses them.

    Every second block of the lower or the upper half; of models with more than 40 blocks, of the lowest or the highest
    20. Tied embeddings begin with block 2 (block 1 of two): there the embeddings answer with the token that was read.

    Raises ConfigError where nothing is left.
    """
    start = 0 if not tied or blocks < 2 else 1 if blocks == 2 else 2
    if name == "high":
        found = range(blocks // 2 if blocks <= _DEEP else blocks - _BUCKET, blocks, 2)
    elif start == blocks // 2:
        found = range(start, start + 1)
    else:
        found = range(start, blocks // 2 if blocks <= _DEEP else _BUCKET, 2)
    if not found:
        raise ConfigError(
            f"layers '{name}' are none of a model with {blocks} blocks and tied embeddings; name them, as layers=1."
        )
    return tuple(found)
