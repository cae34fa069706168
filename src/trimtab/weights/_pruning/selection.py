"""Which units are removed: those with the smallest scores, in exact numbers.

Scores are compared inside groups; equal scores go by position, the earlier one first, as a stable sort does. The
number that is removed is computed by the rule of the method (`row_count`, `matrix_count`), and is then exact: ties at
the threshold remove no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError

_GROUPED = re.compile(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*")


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How much is removed: a share of what is compared, or `group` = (n, m), n of every m columns of a row."""

    share: Fraction
    group: tuple[int, int] | None = None

    @classmethod
    def of(cls, sparsity: float | str, owner: str) -> Sparsity:
        """Read 0.5, "0.5", "50%" or "2:4". Raises ConfigError naming `owner`, whose option it is."""
        text = str(sparsity)
        if grouped := _GROUPED.fullmatch(text):
            n, m = int(grouped[1]), int(grouped[2])
            if not 0 < n < m:
                raise ConfigError(
                    f"{owner}: option sparsity='{text}' must remove at least one of its m columns and keep one: n:m "
                    "with 0 < n < m, such as 2:4."
                )
            return cls(Fraction(n, m), (n, m))
        try:
            share = Fraction(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
        except (ValueError, ZeroDivisionError):
            share = Fraction(-1)
        if not 0 < share < 1:
            raise ConfigError(
                f"{owner}: option sparsity={sparsity!r} must be a share above 0 and below 1 (0.5, 50%), or n of every "
                "m columns (2:4, 4:8)."
            )
        return cls(share)

    def row_count(self, columns: int) -> int:
        """Removed from a row by the rule of Wanda's code: floor(columns * share)."""
        return int(columns * self.share)

    def matrix_count(self, entries: int) -> int:
        """Removed from `entries` that are compared with one threshold, by the rule of SparseGPT's and Wanda's code:
        everything up to and with the entry of rank floor(entries * share), counted from 0."""
        return int(entries * self.share) + 1


def smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """bool like `scores` [groups, size]: true at the `count` smallest of each group; `count` may be int [groups].

    Raises NumericsError for a score that is NaN.
    """
    if bool(scores.isnan().any()):
        raise NumericsError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: nothing can be selected.")
    order = torch.sort(scores, dim=1, stable=True).indices
    wanted = torch.as_tensor(count, device=scores.device).reshape(-1, 1)
    chosen = (torch.arange(scores.shape[1], device=scores.device) < wanted).expand(scores.shape)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen)


def smallest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of every row of [out, in]."""
    return smallest(scores, count)


def smallest_of_matrix(scores: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of [out, in]."""
    return smallest(scores.reshape(1, -1), count).view(scores.shape)


def smallest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The n smallest of every m neighbouring columns of [out, in]. Raises ConfigError if m does not divide `in`."""
    if scores.shape[1] % m:
        raise ConfigError(f"groups of {m} columns do not divide {scores.shape[1]}.")
    return smallest(scores.reshape(-1, m), n).view(scores.shape)


def counts_of_all(scores: Callable[[], Iterator[tuple[str, Tensor]]], count: int) -> dict[str, int]:
    """How many of the `count` smallest scores of all matrices together fall into each: name -> number.

    `scores` yields (name, scores, non-negative and finite) of one matrix after another, the same each time: it is
    called three times, so no more than one matrix has to be in memory. Taking that many of each matrix
    (`smallest_of_matrix`) is then exactly the selection over all; among equal scores, earlier matrices lose first.
    """
    threshold, below = _kth_pattern(scores, count)
    left, counts = count - below, {}
    for name, own in scores():
        patterns = _patterns(name, own)
        ties = min(left, int((patterns == threshold).sum()))
        counts[name] = int((patterns < threshold).sum()) + ties
        left -= ties
    return counts


def _kth_pattern(scores: Callable[[], Iterator[tuple[str, Tensor]]], count: int) -> tuple[int, int]:
    """Bit pattern of the `count`-th smallest score, and how many are below it: two passes of 16 bits each."""
    prefix, below = 0, 0
    for shift in (16, 0):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for name, own in scores():
            patterns = _patterns(name, own)
            if shift == 0:
                patterns = patterns[patterns >> 16 == prefix]
            histogram += torch.bincount(((patterns >> shift) & 0xFFFF).cpu(), minlength=1 << 16)
        total = histogram.cumsum(0) + below
        place = int(torch.searchsorted(total, count))
        if place == len(total):
            raise ConfigError(f"{count} of {int(total[-1])} scores cannot be selected.")
        below = int(total[place] - histogram[place])
        prefix = prefix << 16 | place
    return prefix, below


def _patterns(name: str, scores: Tensor) -> Tensor:
    """The bits of non-negative float32 scores as whole numbers, which are in the same order."""
    scores = scores.float().reshape(-1)
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise NumericsError(f"the scores of {name} are not all finite and non-negative.")
    return (scores + 0.0).view(torch.int32).long()
