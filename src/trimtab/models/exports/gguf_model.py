"""What llama.cpp wants to know of a model beside its matrices: names, hyperparameters, order of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from trimtab.core.errors import TargetError

_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp whose models are laid out as transformers' `model_type` of the same name.

    block       what its blocks hold beside the common parts, ours -> llama.cpp's
    interleaved it rotates neighbouring channels (2 j, 2 j + 1) where transformers rotates (j, j + d / 2), so rows of
                the query and key projections are reordered, head by head
    """

    name: str
    block: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Raises TargetError for a model that llama.cpp would compute otherwise, or that is not known here."""
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise TargetError(f"gguf knows the model types {', '.join(ARCHITECTURES)}, not '{config.model_type}'.")
    rope = _rope(config)
    if rope != "default" and not (rope == "llama3" and known.name == "llama"):
        raise TargetError(f"gguf: rotary embedding of type '{rope}' cannot be written for '{known.name}'.")
    if getattr(config, "use_sliding_window", False):
        raise TargetError(f"gguf: sliding-window attention cannot be written for '{known.name}'.")
    if config.hidden_act != "silu":
        raise TargetError(f"gguf: '{known.name}' computes silu in its MLP, not '{config.hidden_act}'.")
    return known


def written_name(name: str, architecture: Architecture) -> str:
    """llama.cpp's name of a tensor such as `model.layers.0.mlp.up_proj.weight`. Raises TargetError if it has none."""
    owner, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        if owner in _MODEL:
            return f"{_MODEL[owner]}.{leaf}"
        split = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", owner)
        part = {**_BLOCK, **architecture.block}.get(split[2]) if split else None
        if split and part:
            return f"blk.{split[1]}.{part}.{leaf}"
    raise TargetError(f"gguf: the tensor '{name}' has no place in a file of architecture '{architecture.name}'.")


def row_order(name: str, architecture: Architecture, config: PretrainedConfig) -> Tensor | None:
    """Indices of the rows of tensor `name` in the order of the file; None where they stay as they are.

    Rows j and j + d / 2 of each head of d rows become rows 2 j and 2 j + 1.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None or not architecture.interleaved:
        return None
    return torch.arange(heads * config.head_dim).view(heads, 2, -1).transpose(1, 2).flatten()


def hyperparameters(config: PretrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """Method of `gguf.GGUFWriter` -> its argument."""
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return {
        "add_block_count": config.num_hidden_layers,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_rope_dimension_count": head_dim,
        "add_rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "add_layer_norm_rms_eps": float(config.rms_norm_eps),
        "add_vocab_size": config.vocab_size,
    }


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2], for Llama 3's scaling; else None."""
    config = model.config
    if _rope(config) != "llama3":
        return None
    found = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float()
    exponents = torch.arange(len(found), dtype=torch.float64) / len(found)
    plain = float(config.rope_parameters["rope_theta"]) ** -exponents
    return (plain / found.double()).float()


def _rope(config: PretrainedConfig) -> str:
    return str((config.rope_parameters or {}).get("rope_type", "default"))
