"""Qwen3: Llama's layout with a norm on each head's query and key; heads may be wider than hidden_size / num_heads."""

from __future__ import annotations

from trimtab.models.families.base import SMALL, Family

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    attention_arguments=lambda attention: {"sliding_window": attention.sliding_window},
    q_norm="q_norm",
    k_norm="k_norm",
    small={**SMALL, "head_dim": 16},
)
