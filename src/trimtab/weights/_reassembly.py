"""Which channels to split and which to merge: channel disassembly and assembly of QLLM.

A channel j whose largest magnitude exceeds a threshold t becomes T_j = ceil(max|x_j| / t) equal shares. That adds
M = sum (T_j - 1) channels, and M pairs of other channels are merged to take their place. Merging i and j, activations
into their mean and weight columns into their sum, errs by exactly `(x_i - x_j)(w_i - w_j)^T / 2`, so the cost of a pair
is `D(i, j) = |x_i - x_j|^2 |w_i - w_j|^2 / 4` with norms over tokens and over all rows that read the channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.tensors.reindex import Reindex


@dataclass(frozen=True, slots=True)
class Matching:
    """Even channels, each with the odd channel that it is cheapest to merge into, cheapest first.

    even, odd    int64 [pairs]
    """

    even: Tensor
    odd: Tensor


def pair_costs(tokens: Tensor, weight: Tensor) -> Tensor:
    """D of every even channel with every odd one, float32 [even, odd].

    tokens    [k, in]: a sample of input rows, the same for all channels
    weight    [rows, in]: the rows of all linears that read the input
    """
    distances = [_squared_distances(matrix.float()) for matrix in (tokens, weight)]
    return distances[0] * distances[1] / 4


def _squared_distances(matrix: Tensor) -> Tensor:
    even, odd = matrix[:, 0::2], matrix[:, 1::2]
    squares = even.square().sum(0)[:, None] + odd.square().sum(0)[None]
    return (squares - 2 * even.t() @ odd).clamp_min(0)


def matched(costs: Tensor, split: Tensor) -> Matching:
    """Bipartite soft matching: the best odd partner of each even channel, split channels (bool [in]) left out.

    Equal costs go to the lower channel.
    """
    costs = costs.masked_fill(split[0::2, None], torch.inf).masked_fill(split[None, 1::2], torch.inf)
    if not costs.numel():
        return Matching(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    best, partner = costs.min(dim=1)
    order = best.argsort(stable=True)
    order = order[torch.isfinite(best[order])]
    return Matching(2 * order.cpu(), 2 * partner[order].cpu() + 1)


def shares(largest: Tensor, threshold: float) -> Tensor:
    """T of each channel, int64 [in], given max|x_j| [in]."""
    return (largest / threshold).ceil().clamp_min(1).long()


def reassembled(largest: Tensor, threshold: float, costs: Tensor) -> Reindex | None:
    """The reindexing at this threshold, as wide as the input; None if nothing exceeds it, or too few pairs are left."""
    parts = shares(largest, threshold).cpu()
    added = int((parts - 1).sum())
    matching = matched(costs, parts > 1)
    if added == 0 or added > len(matching.even):
        return None
    groups: dict[int, list[int]] = {channel: [channel] for channel in range(len(parts))}
    for even, odd in zip(matching.even[:added].tolist(), matching.odd[:added].tolist(), strict=True):
        groups[odd].append(even)
        del groups[even]
    rows = [(members, int(parts[channel])) for channel, members in groups.items() for _ in range(int(parts[channel]))]
    return Reindex.of(len(parts), rows)


def thresholds(largest: Tensor) -> Tensor:
    """Thresholds to try, from the largest magnitude downwards: as many steps as the paper's code takes, float64."""
    high, low = float(largest.max()), float(largest.min())
    steps = max(100, int(high / 0.5))
    return high - (high - low) / steps * torch.arange(1, steps, dtype=torch.float64)
