"""Plain PyTorch: what is added to a product for a low-rank and for a sparse term."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_add_reference(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + (x right^T) left^T, products and sums in float32 or wider, rounded once to the dtype of out."""
    wide = torch.promote_types(torch.promote_types(x.dtype, left.dtype), torch.float32)
    inner = torch.nn.functional.linear(x.to(wide), right.to(wide))
    return (out.to(wide) + torch.nn.functional.linear(inner, left.to(wide))).to(out.dtype)


def sparse_add_reference(out: Tensor, x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """out + x S^T for S in compressed sparse rows, products and sums in float32 or wider, rounded once."""
    wide = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    flat = x.reshape(-1, x.shape[-1])
    rows = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), (offsets[1:] - offsets[:-1]).long()
    )
    products = flat[:, columns.long()].to(wide) * values.to(wide)
    sums = products.new_zeros(len(flat), len(offsets) - 1).index_add_(1, rows, products)
    return (out.to(wide) + sums.reshape(out.shape)).to(out.dtype)
