"""The reference architectures, and a forward pass that is fast on a CPU.

The models are plain ``LlamaForCausalLM`` and are saved as such. For training, ``TrainingLoss``
computes the same function from the same parameters, but with fused projections, causal attention in
query blocks (a block does not compute the scores that the mask would discard) and everything except
the normalisations in bfloat16. A test holds it to the upstream forward.

Shapes: B rows, T tokens, D hidden, H heads, K key-value heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimtab.training.reference.tokenizer import CONTEXT, VOCAB_SIZE

QUERY_BLOCK = 128
"""Queries per attention block."""

ROPE_THETA = 10000.0

MODELS: dict[str, dict[str, int]] = {
    "ref": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "ref-mini": {
        "hidden_size": 128,
        "intermediate_size": 384,  # a multiple of the default group of 64
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def build(name: str, seed: int, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """A freshly initialised reference model in float32."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(MODELS[name])
    config = LlamaConfig(
        vocab_size=vocab_size,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    return LlamaForCausalLM(config)


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (gain * scaled).to(torch.bfloat16)


def _rotate(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    first, second = x_BTHC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BTHC * cos_BTC.unsqueeze(2) + turned * sin_BTC.unsqueeze(2)


def _attend(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
    """Causal attention with grouped heads; returns [B, T, H * C]."""
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    q = (q_BTHC * C**-0.5).transpose(1, 2)
    k = k_BTKC.transpose(1, 2).repeat_interleave(H // K, dim=1).transpose(2, 3)
    v = v_BTKC.transpose(1, 2).repeat_interleave(H // K, dim=1)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = q[:, :, start:end] @ k[..., :end]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.masked_fill(mask, -1e9).softmax(-1)
        blocks.append(weights @ v[:, :, :end])
    return torch.cat(blocks, dim=2).transpose(1, 2).reshape(B, T, H * C)


def _block(x_BTD: Tensor, layer: LlamaDecoderLayer, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """One transformer block."""
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    C, eps = attention.head_dim, config.rms_norm_eps
    H, K = config.num_attention_heads, config.num_key_value_heads
    assert K is not None
    B, T, _ = x_BTD.shape
    weight = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    h = _rms_norm(x_BTD, layer.input_layernorm.weight, eps)
    q, k, v = torch.split(F.linear(h, weight.to(torch.bfloat16)), [H * C, K * C, K * C], dim=-1)
    q = _rotate(q.view(B, T, H, C), cos_BTC, sin_BTC)
    k = _rotate(k.view(B, T, K, C), cos_BTC, sin_BTC)
    mixed = _attend(q, k, v.view(B, T, K, C))
    x = x_BTD + F.linear(mixed, attention.o_proj.weight.to(torch.bfloat16))
    h = _rms_norm(x, layer.post_attention_layernorm.weight, eps)
    weight = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).to(torch.bfloat16)
    gate, up = F.linear(h, weight).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, mlp.down_proj.weight.to(torch.bfloat16))


def _head(x_BTD: Tensor, gain: Tensor, eps: float, embedding: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted mean cross-entropy from the last hidden states."""
    h = _rms_norm(x_BTD, gain, eps)
    logits = F.linear(h, embedding.to(torch.bfloat16)).flatten(0, 1).float()
    losses = F.cross_entropy(logits, targets_BT.flatten(), reduction="none")
    weights = weights_BT.flatten()
    return (losses * weights).sum() / weights.sum()


class TrainingLoss:
    """Weighted mean cross-entropy of the next token, block by block.

    compiled  compile one block and the loss (all blocks share the compiled code, so that it takes
              seconds and not minutes per shape).
    """

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model = model
        self.block: Callable[..., Tensor] = torch.compile(_block, dynamic=False) if compiled else _block
        self.head: Callable[..., Tensor] = torch.compile(_head, dynamic=False) if compiled else _head

    def hidden_states(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] before the last normalisation."""
        config = self.model.config
        C = config.head_dim
        assert C is not None
        half = torch.arange(0, C, 2, dtype=torch.float32, device=ids_BT.device) / C
        angles = positions_BT.float().unsqueeze(-1) * (ROPE_THETA**-half)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        x: Tensor = self.model.model.embed_tokens(ids_BT)
        for layer in self.model.model.layers:
            x = self.block(x, layer, cos, sin)
        return x

    def __call__(self, ids_BT: Tensor, weights_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The loss of a batch; ``weights_BT`` weighs the prediction *of* each token."""
        inner = self.model.model
        x = self.hidden_states(ids_BT[:, :-1], positions_BT[:, :-1])
        loss: Tensor = self.head(
            x,
            inner.norm.weight,
            self.model.config.rms_norm_eps,
            inner.embed_tokens.weight,
            ids_BT[:, 1:],
            weights_BT[:, 1:],
        )
        return loss
