"""A Llama model as the GGUF file that llama.cpp reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError

WEIGHT_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_OF_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_BLOCK = {
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


def export_gguf(model: PreTrainedModel, path: Path, weight_type: str = "bf16") -> None:
    """Write the weights of a transformers Llama model without biases, and no tokenizer: llama.cpp then takes token ids.

    weight_type   of matrices, a key of WEIGHT_TYPES; norm gains are float32

    llama.cpp rotates neighbouring channels (2 j, 2 j + 1) where transformers rotates (j, j + d / 2), so rows of the
    query and key projections are put in that order, head by head.
    Raises ConfigError for another architecture, scaled rotary embedding or an unknown weight type.
    """
    gguf: Any = importlib.import_module("gguf")
    config = model.config
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"gguf: weight_type is '{weight_type}', but must be one of {', '.join(WEIGHT_TYPES)}.")
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ConfigError(f"gguf: the model is '{config.model_type}'; only Llama models without biases can be written.")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ConfigError(f"gguf: the rotary embedding is '{rope['rope_type']}'; only 'default' can be written.")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output matrix
        written, part = _gguf_name(name)
        if part in heads:
            tensor = _interleave(tensor, heads[part])
        data, kind = _as_numpy(tensor, weight_type if tensor.ndim > 1 else "f32")
        writer.add_tensor(written, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> tuple[str, str]:
    """llama.cpp's name of a tensor, and which part of a block it is ("" outside blocks). Raises ConfigError."""
    if name in _OF_MODEL:
        return _OF_MODEL[name], ""
    block, _, part = name.removeprefix("model.layers.").partition(".")
    part = part.removesuffix(".weight")
    if part not in _OF_BLOCK:
        raise ConfigError(f"gguf: the tensor '{name}' has no place in a Llama file.")
    return f"blk.{block}.{_OF_BLOCK[part]}.weight", part


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """[heads * d, in]: row j of the first half of each head to row 2 j, row j of the second half to row 2 j + 1."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _as_numpy(tensor: Tensor, kind: str) -> tuple[Any, str]:
    data = tensor.detach().to(WEIGHT_TYPES[kind]).contiguous()
    # numpy has no bfloat16: its bytes
    return (data.view(torch.uint8).numpy() if kind == "bf16" else data.numpy()), kind.upper()
