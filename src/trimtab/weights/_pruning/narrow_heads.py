"""The linears of an attention whose heads lose rotary pairs or value directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.weights._pruning.plan import PlanEntry
from trimtab.weights._pruning.rotary_selection import best_pairs, pair_rows, pair_scores, projected_energy
from trimtab.weights._pruning.units import rotary_pairs
from trimtab.weights._pruning.value_factors import value_factors
from trimtab.weights.base import NarrowLinear

if TYPE_CHECKING:
    from trimtab.models.statistics import Stats
    from trimtab.models.views import BlockView, LinearView, Role

VALUE_RIDGE = 1e-6
"""Added to E[x x^T] for the values, in units of its mean diagonal: directions that no token reaches come last."""


def sliced_pairs(
    block: BlockView, linears: Mapping[Role, LinearView], stats: Mapping[str, Stats], count: int
) -> tuple[dict[str, NarrowLinear], PlanEntry, Tensor]:
    """Queries and keys of the `count` best pairs of each KV head, and which these are: int64 [kv_heads, count].

    `stats` holds the Gram matrix of what they read and, if they have biases, its mean.
    """
    attention, q, k = block.attention, linears["q"], linears["k"]
    kv_heads, dim, rotary_dim = attention.num_kv_heads, attention.head_dim, attention.rotary_dim
    queries, keys = (_energy(linear, stats).view(kv_heads, -1, dim) for linear in (q, k))
    scores = pair_scores(queries, keys[:, 0], rotary_dim).cpu()
    pairs = best_pairs(scores, count)
    kept = float(scores.gather(1, pairs).sum() / scores.sum()) if bool(scores.any()) else 1.0
    made = {}
    for linear, share in ((q, attention.num_heads // kv_heads), (k, 1)):
        rows = pair_rows(pairs, share=share, head_dim=dim, rotary_dim=rotary_dim).to(linear.weight.device)
        bias = None if linear.bias is None else linear.bias[rows]
        made[linear.name] = NarrowLinear(linear.weight[rows], bias, {"kept_energy": kept})
    keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, pairs, True)
    return made, PlanEntry.of(rotary_pairs(block), keep.reshape(-1)), pairs


def sliced_values(
    block: BlockView, linears: Mapping[Role, LinearView], stats: Mapping[str, Stats], rank: int, joint: bool
) -> dict[str, NarrowLinear]:
    """Values and outputs of `rank` directions for each KV head.

    joint    choose them by what reaches the output of all queries of a head together, where there are several

    The bias of v, which attention hands on unchanged since its weights sum to one, goes into that of o.
    """
    attention, v, o = block.attention, linears["v"], linears["o"]
    kv_heads, dim = attention.num_kv_heads, attention.value_dim
    share = attention.num_heads // kv_heads
    gram = gram_of(stats, v).double().clone()
    gram.diagonal().add_(VALUE_RIDGE * float(gram.diagonal().mean()))
    values = v.weight.reshape(kv_heads, dim, -1)
    outputs = o.weight.reshape(-1, kv_heads, share, dim)  # [out, KV head, query, dimension]
    new_values, new_outputs, error, scale = [], [], 0.0, 0.0
    for head in range(kv_heads):
        stacked = outputs[:, head].transpose(0, 1).reshape(-1, dim)
        found = value_factors(values[head], stacked, gram, rank, by_output=joint or share == 1)
        new_values.append(found.values)
        new_outputs.append(found.outputs.view(share, -1, rank).transpose(0, 1))
        error, scale = error + found.error, scale + found.scale
    bias = o.bias
    if v.bias is not None:
        through = v.bias.double().view(kv_heads, 1, dim).expand(-1, share, -1).reshape(-1)
        constant = o.weight.double() @ through
        bias = (constant if bias is None else constant + bias.double()).to(o.weight.dtype)
    tail = {"relative_tail": error / scale if scale > 0 else 0.0}
    narrow_values = torch.cat(new_values).to(v.weight.dtype)
    narrow_outputs = torch.stack(new_outputs, dim=1).reshape(o.out_features, -1).to(o.weight.dtype)
    return {v.name: NarrowLinear(narrow_values, None), o.name: NarrowLinear(narrow_outputs, bias, tail)}


def _energy(linear: LinearView, stats: Mapping[str, Stats]) -> Tensor:
    mean = stats[linear.site].mean
    at = None if mean is None else mean.to(linear.weight.device)
    return projected_energy(linear.weight, linear.bias, gram_of(stats, linear), at)


def gram_of(stats: Mapping[str, Stats], linear: LinearView) -> Tensor:
    """The Gram matrix of what a linear reads, where its weight is."""
    gram = stats[linear.site].gram
    assert gram is not None
    return gram.to(linear.weight.device)
