"""Gemma 2 and Gemma 3 (text): norms before and after attention and MLP, gains stored as an offset from one."""

from __future__ import annotations

from dataclasses import replace

from trimtab.models.families.base import SMALL, Family

GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    unit_offset_norms=True,
    small={**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
)

GEMMA3 = replace(GEMMA2, name="gemma3", model_type="gemma3_text", q_norm="q_norm", k_norm="k_norm")
