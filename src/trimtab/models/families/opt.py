"""OPT: biased linears, learned positions, an ungated MLP that lies directly in the block, a tied head."""

from __future__ import annotations

from transformers import PretrainedConfig

from trimtab.models.families.base import Family


def _refuses(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "OPT with norms after the residual (do_layer_norm_before=False, as opt-350m) has no norm per linear input."
        )
    return None


OPT = Family(
    name="opt",
    model_type="opt",
    blocks="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    attention_linears={"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"},
    attention_norm="self_attn_layer_norm",
    mlp="",
    mlp_linears={"fc1": "up", "fc2": "down"},
    mlp_norm="final_layer_norm",
    mlp_width="ffn_dim",
    refuses=_refuses,
    small={
        "vocab_size": 131,
        "hidden_size": 48,
        "ffn_dim": 112,
        "word_embed_proj_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
)
