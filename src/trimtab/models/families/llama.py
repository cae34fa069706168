"""Llama: separate projections, grouped-query attention, gated MLP. The ref models are Llamas too."""

from __future__ import annotations

from trimtab.models.families.base import SMALL, Family

LLAMA = Family(name="llama", model_type="llama", attention_arguments=lambda attention: {}, small=SMALL)
