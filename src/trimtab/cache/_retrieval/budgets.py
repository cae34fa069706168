"""From head scores to how much cache each KV head gets: arithmetic on scores, no model and no cache.

    full_heads        two classes (DuoAttention): the whole context, or sinks and recent tokens
    capacities        so many tokens per head (HeadKV)
    bits_per_head     so many bits per head, at the least weighted error

Scores are per KV head, as `HeadScores.kv_scores` gives them. Sources: Xiao et al. 2024, "DuoAttention",
arXiv:2410.10819, and its code; Fu et al. 2024, "Not All Heads Matter" (HeadKV), arXiv:2410.19258, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.cache._retrieval.scores import ranked
from trimtab.core.errors import BudgetError, ConfigError


def full_heads(scores: Tensor, full_fraction: float, ties: Tensor | None = None) -> Tensor:
    """[layers, KV heads] bool: the heads that keep the whole context, the best `full_fraction` of all by rank.

    scores   [layers, KV heads]
    ties     the same shape: decides between equal scores (`HeadScores.kv_sums`); then the earlier head is the better

    Their number is full_fraction * heads, rounded (halves to even). DuoAttention cuts learned gates at a quantile and
    breaks ties by noise; here the classes come from retrieval scores, and the same scores give the same classes.
    Raises ConfigError for a fraction outside [0, 1].
    """
    if not 0 <= full_fraction <= 1:
        raise ConfigError(f"full_fraction must be in [0, 1], not {full_fraction}.")
    full = torch.zeros(scores.shape, dtype=torch.bool)
    for head in ranked(scores, ties)[: round(full_fraction * scores.numel())]:
        full[head] = True
    return full


def capacities(scores: Tensor, mean: int, beta: float, most: int | None = None) -> Tensor:
    """[layers, KV heads] int64: tokens that each head keeps, `mean` on average over the N heads, exactly.

        least = mean - floor(mean / beta),  pool = N floor(mean / beta),  b_h = least + pool s_h / sum(s)

    scores   [layers, KV heads], not negative; all zero: every head is alike
    beta     above 1; towards 1 all is given by score, a large one gives every head `mean`
    most     no head gets more than this (the context, say); what it cannot use goes to the others by their scores

    The window of recent tokens comes on top. Shares are rounded to the largest remainders, earlier heads first, so that
    the sum is exact, where the paper's code rounds each. Raises ConfigError for options out of range, BudgetError if
    `most` is below `mean`.
    """
    if mean < 0 or not beta > 1:
        raise ConfigError(f"capacities need mean >= 0 and beta > 1, not {mean} and {beta}.")
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()) or not scores.numel():
        raise ConfigError(
            f"capacities need scores of at least one head that are finite and not negative, not {scores}."
        )
    if most is not None and most < mean:
        raise BudgetError(f"heads of at most {most} tokens cannot hold {mean} on average; most={mean} is the least.")
    given = math.floor(mean / beta)
    weights = [float(score) for score in scores.flatten()]
    extra = _shared(given * len(weights), weights, None if most is None else most - (mean - given))
    return (torch.tensor(extra, dtype=torch.int64) + mean - given).view(scores.shape)


def _shared(pool: int, weights: Sequence[float], most: int | None) -> list[int]:
    """`pool` whole units in proportion to the weights (alike if none is positive), at most `most` each."""
    shares = [0] * len(weights)
    open_heads = list(range(len(weights)))
    while pool and open_heads:
        total = sum(weights[h] for h in open_heads)
        parts = {h: pool * (weights[h] / total if total > 0 else 1 / len(open_heads)) for h in open_heads}
        full = [h for h in open_heads if most is not None and parts[h] >= most]
        if not full:
            whole = {h: math.floor(part) for h, part in parts.items()}
            left = pool - sum(whole.values())
            for h in sorted(open_heads, key=lambda h: (whole[h] - parts[h], h))[:left]:
                whole[h] += 1
            for h, share in whole.items():
                shares[h] = share
            break
        for h in full:
            assert most is not None
            shares[h] = most
            pool -= most
        open_heads = [h for h in open_heads if h not in full]
    return shares


def bits_per_head(
    weights: Sequence[float], errors: Mapping[int, Sequence[float]], nbytes: Mapping[int, int], budget: int
) -> tuple[int, ...]:
    """Bits of each head, chosen greedily for the least sum of weights[h] * errors[bits][h] within `budget` bytes.

    weights   per head, for instance its retrieval score plus a floor
    errors    bits -> error of each head, for instance of its attention output
    nbytes    bits -> bytes of one head

    All heads begin with the cheapest choice; then the step (of any head, to any dearer choice) that fits and saves the
    most weighted error per byte is taken, until none saves. This is optimal up to the last step where errors fall
    convexly with bytes. Raises BudgetError if the cheapest choice does not fit, ConfigError if tables do not agree.
    """
    if set(errors) != set(nbytes) or not errors or any(len(row) != len(weights) for row in errors.values()):
        raise ConfigError(
            f"bits_per_head: errors are known for {sorted(errors)} bits and bytes for {sorted(nbytes)}, "
            f"of {sorted({len(row) for row in errors.values()})} heads; there are {len(weights)} weights."
        )
    cheapest = min(nbytes, key=lambda bits: (nbytes[bits], bits))
    chosen = [cheapest] * len(weights)
    left = budget - nbytes[cheapest] * len(weights)
    if left < 0:
        raise BudgetError(
            f"{len(weights)} heads take {budget - left} bytes at {cheapest} bits; the budget is {budget}."
        )
    while True:
        steps = [
            (weights[h] * (errors[now][h] - errors[bits][h]) / (nbytes[bits] - nbytes[now]), -h, -bits)
            for h, now in enumerate(chosen)
            for bits in nbytes
            if 0 < nbytes[bits] - nbytes[now] <= left
        ]
        gain, head, bits = max(steps, default=(0.0, 0, 0))
        if gain <= 0:
            return tuple(chosen)
        left -= nbytes[-bits] - nbytes[chosen[-head]]
        chosen[-head] = -bits
