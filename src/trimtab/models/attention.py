"""The attention backend, registered with transformers as "trimtab": attention straight on what a cache holds.

Without a SegmentCache it computes what transformers' own implementations do: "sdpa", with the heads of a single query
arranged for a processor, or a plain one where scores are capped (Gemma 2), which torch's kernel cannot do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from trimtab.core.errors import CompositionError
from trimtab.kernels.kv_attention import dense

BACKEND = "trimtab"


def use_backend(model: PreTrainedModel) -> None:
    """Set the model's attention implementation to "trimtab". Raises CompositionError for a model that refuses it."""
    if model.config.get_text_config()._attn_implementation == BACKEND:
        return
    AttentionInterface.register(BACKEND, attention)
    AttentionMaskInterface.register(BACKEND, sdpa_mask)
    try:
        model.set_attn_implementation(BACKEND)
    except (ValueError, KeyError) as error:
        raise CompositionError(f"{type(model).__name__} takes no other attention implementation: {error}") from error


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [R, Hq, T, d] -> output [R, T, Hq, d], and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, "trimtab_layer", None)
    if layer is not None:
        out = layer.attend(query, attention_mask, kwargs.get("position_ids"), scale, softcap, sliding_window)
        return out.transpose(1, 2).contiguous(), None
    if softcap is None:
        if _shares_keys(query, key, attention_mask):
            return _one_query(query, key, value, scale, dropout), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
    return _capped(query, key, value, attention_mask, scale, softcap, dropout).transpose(1, 2).contiguous(), None


def _shares_keys(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether this is one query per head on a processor, all keys visible, several query heads to a KV head."""
    return query.shape[2] == 1 and mask is None and query.shape[1] > key.shape[1] and query.is_cpu


def _one_query(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Query heads that share keys as so many queries of one head: [R, Hq, 1, d] -> [R, 1, Hq, d].

    torch's kernel would prepare the keys for every head anew, which costs it ten times the attention itself here. With
    many keys our own is faster still.
    """
    if not dropout and dense.takes(query, key, value):
        return dense.one_query(query, key, value, scale)
    rows, heads, _, dim = query.shape
    shared = query.reshape(rows, key.shape[1], -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(shared, key, value, dropout_p=dropout, scale=scale)
    return out.reshape(rows, 1, heads, -1)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout: float
) -> Tensor:
    from trimtab.models.segments.dense import causal_mask, plain_attention

    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    out = plain_attention(query, key, value, mask, scale, softcap, None)
    return torch.nn.functional.dropout(out, dropout) if dropout else out
