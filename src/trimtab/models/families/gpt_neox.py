"""GPT-NeoX and Pythia: q, k, v fused head by head, a part of each head rotated, attention and MLP side by side."""

from __future__ import annotations

from transformers import PretrainedConfig

from trimtab.models.families.base import Family
from trimtab.models.views import Role, Rows, rows_by_head


def _rows(config: PretrainedConfig) -> dict[Role, dict[str, Rows]]:
    heads = int(config.num_attention_heads)
    return {"qkv": rows_by_head(("q", "k", "v"), heads, int(config.hidden_size) // heads)}


GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    attention_linears={"query_key_value": "qkv", "dense": "o"},
    mlp_linears={"dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    parallel=lambda config: bool(config.use_parallel_residual),
    rows=_rows,
    small={
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rotary_pct": 0.25,
    },
)
