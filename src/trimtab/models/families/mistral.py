"""Mistral: Llama's layout, with an optional sliding window."""

from __future__ import annotations

from trimtab.models.families.base import SMALL, Family

MISTRAL = Family(name="mistral", model_type="mistral", small={**SMALL, "sliding_window": 24})
