"""Mistral: Llama's layout, with an optional sliding window."""

from __future__ import annotations

from trimtab.models.families.base import SMALL, Family

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    attention_arguments=lambda attention: {"sliding_window": getattr(attention.config, "sliding_window", None)},
    small={**SMALL, "sliding_window": 24},
)
