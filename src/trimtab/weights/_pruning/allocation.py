"""How much is removed where: the share of each layer, so that together they meet a budget.

    uniform     the same share everywhere
    by_scores   one threshold over all layers: `selection.counts_of_all`
    softmax     more from layers of little influence, by an entropy-regularised objective

A size is whatever the budget counts (parameters, bytes, multiply-accumulates): shares are of sizes, so the same
functions serve all three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trimtab.core.errors import BudgetError, ConfigError, NumericsError


def uniform(sizes: Mapping[str, float], share: float) -> dict[str, float]:
    """The same share of every layer: name -> share of its size to remove."""
    _check(sizes, share)
    return dict.fromkeys(sizes, share)


def softmax(
    scores: Mapping[str, float], sizes: Mapping[str, float], share: float, *, temperature: float, cap: float = 0.8
) -> dict[str, float]:
    """Shares in proportion to softmax(-score / temperature), with sum(share_l * size_l) = share * sum(size_l).

    scores    of the same layers as `sizes`: how much a layer matters (block influence, say)
    cap       no layer loses more; what it would have lost goes to the others in the same proportion

    With layers of one size these are `L * share * softmax(-score / temperature)`, the maximum of
    sum_l score_l (1 - share_l) + temperature * entropy(shares) (MoDeGPT, arXiv:2408.09632). A large temperature is
    uniform. Raises BudgetError if `share` is above `cap`, ConfigError for a temperature that is not positive or layers
    that differ, NumericsError for a score that is no number.
    """
    _check(sizes, share)
    if set(scores) != set(sizes):
        raise ConfigError(f"scores of {sorted(scores)} and sizes of {sorted(sizes)} are not of the same layers.")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} of the allocation must be positive.")
    if share > cap:
        raise BudgetError(f"a share of {share:g} cannot be removed when no layer may lose more than {cap:g}.")
    names = list(sizes)
    logits = -torch.tensor([scores[name] for name in names], dtype=torch.float64) / temperature
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError(f"the scores of the allocation are not all finite: {dict(scores)}.")
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    shares, open_ = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    while bool(open_.any()):
        left = share * size.sum() - (shares * size)[~open_].sum()
        relative = torch.softmax(torch.where(open_, logits, -torch.inf), 0)
        wanted = relative * left / (relative * size).sum()
        over = open_ & (wanted > cap)
        shares = torch.where(over, cap, torch.where(open_, wanted, shares))
        if not bool(over.any()):
            break
        open_ &= ~over
    return dict(zip(names, shares.tolist(), strict=True))


def _check(sizes: Mapping[str, float], share: float) -> None:
    if not sizes or not all(size > 0 for size in sizes.values()):
        raise ConfigError(f"an allocation wants at least one layer, each with a positive size, not {dict(sizes)}.")
    if not 0 <= share <= 1:
        raise ConfigError(f"a share of {share} cannot be removed; it must be in [0, 1].")
