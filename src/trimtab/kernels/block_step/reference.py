"""Plain PyTorch: the two halves of a block, rounded where transformers' modules round."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.block_step.block import Block, Layer, LowRankTerm, Norm
from trimtab.kernels.gather_matmul.reference import gather_matmul_reference
from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.grid_matmul.reference import grid_matmul_reference
from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.sparse_matmul.reference import sparse_matmul_reference
from trimtab.kernels.terms.reference import low_rank_add_reference, sparse_add_reference


def before_reference(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, T, hidden], cos and sin [R or 1, T, d] -> queries, keys and values [R, heads, T, d]."""
    normed = _norm(x, block.attention_norm)
    q, k, v = (_linear(normed, layer).view(*x.shape[:2], -1, block.head_dim) for layer in (block.q, block.k, block.v))
    q, k = (head if norm is None else _norm(head, norm) for head, norm in ((q, block.q_norm), (k, block.k_norm)))
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return _rotated(q, cos[:, None], sin[:, None]), _rotated(k, cos[:, None], sin[:, None]), v


def after_reference(block: Block, attended: Tensor, x: Tensor) -> Tensor:
    """attended [R, T, query heads * d] and the block's input x [R, T, hidden] -> its output."""
    total = x + _linear(attended, block.o)
    normed = _norm(total, block.mlp_norm)
    inner = torch.nn.functional.silu(_linear(normed, block.gate)) * _linear(normed, block.up)
    return total + _linear(inner, block.down)


def _linear(x: Tensor, layer: Layer) -> Tensor:
    if isinstance(layer.weight, GridWeight):
        y = grid_matmul_reference(x, (layer.weight,))[0]
    elif isinstance(layer.weight, GatherWeight):
        weight = layer.weight
        y = gather_matmul_reference(x, weight.columns, float(weight.threshold), weight.scale, weight.left, weight.right)
    else:
        y = sparse_matmul_reference(x, (layer.weight,))[0]
    for term in layer.terms:
        if isinstance(term, LowRankTerm):
            y = low_rank_add_reference(y, x, term.left, term.right)
        else:
            y = sparse_add_reference(y, x, term.values, term.columns, term.offsets)
    return y if layer.bias is None else y + layer.bias


def _norm(x: Tensor, norm: Norm) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    return norm.weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
