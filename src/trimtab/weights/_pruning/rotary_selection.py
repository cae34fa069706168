"""Which rotary pairs of a KV head stay: those whose queries and keys have the most energy (MoDeGPT's type II).

A pair turns as one under the rotation by position, so it stays or goes as one, and its energy is the same before and
after. The queries of a KV head share its keys, and so its pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.weights._pruning.selection import smallest


def projected_energy(weight: Tensor, bias: Tensor | None, gram: Tensor, mean: Tensor | None) -> Tensor:
    """E[(w x + b)^2] of each row w of `weight` [out, in], float64 [out].

    gram    E[x x^T] [in, in]
    mean    E[x] [in]; not read without a bias
    """
    wide = weight.double()
    energy = ((wide @ gram.double()) * wide).sum(dim=1)
    if bias is not None:
        assert mean is not None, "energies of a biased projection need the mean of its input"
        shift = bias.double()
        energy = energy + 2 * shift * (wide @ mean.double()) + shift.square()
    return energy.clamp(min=0)


def pair_scores(queries: Tensor, keys: Tensor, rotary_dim: int) -> Tensor:
    """E_K,p times the sum of E_Q,p over the queries of each KV head: float64 [kv_heads, rotary_dim / 2].

    queries    energy of each dimension [kv_heads, queries of each, head_dim]
    keys       [kv_heads, head_dim]

    Pair p is the dimensions p and p + rotary_dim / 2, and its energy their sum.
    """
    half = rotary_dim // 2
    return _of_pairs(keys, half) * _of_pairs(queries, half).sum(dim=1)


def best_pairs(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each KV head [kv_heads, pairs]: int64 [kv_heads, count], ascending; of equal ones the
    lower index loses. Raises NumericsError for NaN."""
    removed = smallest(scores, scores.shape[1] - count)
    return (~removed).nonzero()[:, 1].view(len(scores), count)


def pair_rows(pairs: Tensor, *, share: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Rows of a projection that stay, int64, in the order of the narrowed one.

    pairs    [kv_heads, kept]
    share    heads of the projection for each KV head, side by side: 1 for keys

    Per head: the first halves of its pairs, the second halves, then what is not rotated.
    """
    heads, still = len(pairs), torch.arange(rotary_dim, head_dim)
    within = torch.cat([pairs, pairs + rotary_dim // 2, still.expand(heads, -1)], dim=1)
    starts = torch.arange(heads * share).view(heads, share, 1) * head_dim
    return (starts + within[:, None]).reshape(-1)


def _of_pairs(energy: Tensor, half: int) -> Tensor:
    return energy[..., :half] + energy[..., half : 2 * half]
