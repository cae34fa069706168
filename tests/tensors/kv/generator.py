"""Synthetic keys and values with what real ones have: outlier channels, slow topics, correlated channels, heavy tails.

A plain Gaussian tensor has none of it, and no method of this package gains anything on one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.reference import rotary
from trimtab.kernels.kv_attention.run import Rope

TOPICS = 6


@dataclass(frozen=True, eq=False)
class Block:
    """pre, post: keys before and after rotary embedding; values. Each [H, n, d] float32."""

    pre: Tensor
    post: Tensor
    values: Tensor
    rope: Rope


def rope_table(positions: int, dim: int, base: float = 1e4, scaling: float = 1.0) -> Rope:
    angles = torch.arange(positions)[:, None] * base ** (-torch.arange(dim // 2) * 2 / dim)
    return Rope(angles.cos() * scaling, angles.sin() * scaling)


def synthetic(tokens: int = 1024, heads: int = 8, dim: int = 64, *, seed: int = 0) -> Block:
    """The model (means, bases, mixing) is the same for every seed; the text differs."""
    model = torch.Generator().manual_seed(20240501)
    text = torch.Generator().manual_seed(seed)

    def fixed(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=model)

    mean = fixed(heads, 1, dim) * 0.5
    size = 4 + 5 * torch.rand(heads, 3 * dim // 64, generator=model)
    outliers = torch.rand(heads, dim, generator=model).topk(3 * dim // 64).indices
    mean[:, 0].scatter_(1, outliers, size * fixed(*size.shape).sign())
    key_basis, value_basis = (fixed(heads, TOPICS, dim) / TOPICS**0.5 for _ in range(2))
    spread = torch.exp(0.5 * fixed(heads, 1, dim))
    mixing = fixed(heads, dim, dim) / dim**0.5

    topics = torch.randn(heads, tokens, TOPICS, generator=text)
    for n in range(1, tokens):
        topics[:, n] = 0.95 * topics[:, n - 1] + (1 - 0.95**2) ** 0.5 * topics[:, n]
    pre = mean + 1.2 * topics @ key_basis + 0.6 * (_student(6, (heads, tokens, dim), text) * spread) @ mixing
    scale = torch.exp(0.5 * torch.randn(1, tokens, 1, generator=text))
    values = 0.3 * topics @ value_basis + _student(5, (heads, tokens, dim), text) * scale
    rope = rope_table(tokens, dim)
    return Block(pre, rotary(pre, rope, torch.arange(tokens)), values, rope)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def _student(freedom: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(freedom + 1, *shape, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()
