"""Phi-3: q, k, v in one projection, gate and up in another, parts lying one after the other."""

from __future__ import annotations

from transformers import PretrainedConfig

from trimtab.models.families.base import SMALL, Family, kv_width, query_width
from trimtab.models.views import Role, Rows, rows_in_order


def _rows(config: PretrainedConfig) -> dict[Role, dict[str, Rows]]:
    kv = kv_width(config)
    return {"qkv": rows_in_order(("q", query_width(config)), ("k", kv), ("v", kv))}


PHI3 = Family(
    name="phi3",
    model_type="phi3",
    attention_linears={"qkv_proj": "qkv", "o_proj": "o"},
    mlp_linears={"gate_up_proj": "gate_up", "down_proj": "down"},
    rows=_rows,
    small={**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
)
