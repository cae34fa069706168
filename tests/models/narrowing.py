"""Attention that loses dimensions, and the same attention with those dimensions zeroed: what it must compute."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.narrow import HeadGeometry, narrow_heads, narrow_linear
from trimtab.models.views import AttentionView, LinearView, ModelView


def kept_rows(attention: AttentionView, within: Tensor, share: int) -> Tensor:
    """Rows of a projection, of which each KV head owns `share` heads: `within` [kv_heads, kept] inside a head."""
    starts = torch.arange(attention.num_kv_heads * share)[:, None] * attention.head_dim
    return (within.repeat_interleave(share, dim=0) + starts).reshape(-1)


def narrow_model(model: PreTrainedModel, pairs: int | None, value_dim: int | None, *, step: int = 0) -> PreTrainedModel:
    """Keep random rotary pairs of each KV head, and the first dimensions of its values; returns a twin of the original
    with what was removed set to zero. Each block keeps `step` pairs and twice as many dimensions fewer than the one
    before."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block, other in zip(ModelView.of(model).blocks, ModelView.of(twin).blocks, strict=True):
        attention = block.attention
        share, half = attention.num_heads // attention.num_kv_heads, attention.head_dim // 2
        rows: dict[str, Tensor] = {}
        geometry = HeadGeometry(None, None if value_dim is None else value_dim - 2 * step * block.index)
        if pairs is not None:
            count = pairs - step * block.index
            order = [torch.randperm(half, generator=generator)[:count] for _ in range(attention.num_kv_heads)]
            chosen = torch.stack(order).sort(dim=1).values
            geometry = HeadGeometry(chosen, geometry.value_dim)
            both = torch.cat([chosen, chosen + half], dim=1)
            rows |= {"q": kept_rows(attention, both, share), "k": kept_rows(attention, both, 1)}
        if geometry.value_dim is not None:
            first = torch.arange(geometry.value_dim).expand(attention.num_kv_heads, -1)
            rows |= {"v": kept_rows(attention, first, 1), "o": kept_rows(attention, first, share)}
        zeroed = {linear.role: linear for linear in other.attention.linears}
        for linear in attention.linears:
            if linear.role in rows:
                _cut(linear, zeroed[linear.role], rows[linear.role])
        narrow_heads(attention.module, geometry)
    return twin


def _cut(linear: LinearView, twin: LinearView, kept: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    gone = torch.ones(weight.shape[1 if linear.role == "o" else 0], dtype=torch.bool)
    gone[kept] = False
    if linear.role == "o":
        twin.weight[:, gone] = 0
        linear.replace(narrow_linear(linear.module, weight[:, kept], bias))
        return
    twin.weight[gone] = 0
    if twin.bias is not None:
        twin.bias[gone] = 0
    linear.replace(narrow_linear(linear.module, weight[kept], None if bias is None else bias[kept]))
