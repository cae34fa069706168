"""GPT-2: Conv1D layers (weights stored [in, out]), q, k, v fused, learned positions, a tied head."""

from __future__ import annotations

from transformers import PretrainedConfig

from trimtab.models.families.base import Family
from trimtab.models.views import Role, Rows, rows_in_order


def _rows(config: PretrainedConfig) -> dict[Role, dict[str, Rows]]:
    width = int(config.hidden_size)
    return {"qkv": rows_in_order(("q", width), ("k", width), ("v", width))}


GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    positions="transformer.wpe",
    attention="attn",
    attention_linears={"c_attn": "qkv", "c_proj": "o"},
    attention_norm="ln_1",
    mlp_linears={"c_fc": "up", "c_proj": "down"},
    mlp_norm="ln_2",
    mlp_width="n_inner",
    rows=_rows,
    small={
        "vocab_size": 131,
        "n_embd": 48,
        "n_inner": 112,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
