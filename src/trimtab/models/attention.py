"""The attention backend, registered with transformers as "trimtab": attention straight on what a cache holds.

Without a SegmentCache it computes what transformers' own implementations do: "sdpa", or a plain one where scores are
capped (Gemma 2), which torch's kernel cannot do.
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
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
    return _capped(query, key, value, attention_mask, scale, softcap, dropout).transpose(1, 2).contiguous(), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout: float
) -> Tensor:
    from trimtab.models.segments.dense import causal_mask, plain_attention

    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    out = plain_attention(query, key, value, mask, scale, softcap, None)
    return torch.nn.functional.dropout(out, dropout) if dropout else out
