"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v."""

from __future__ import annotations

from trimtab.models.families.base import SMALL, Family

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    attention_arguments=lambda attention: {"sliding_window": attention.sliding_window},
    small={**SMALL, "tie_word_embeddings": True},
)
