"""A Llama of one layer with a planted attention sink, and text for it: the mechanism of StreamingLLM at its smallest.

The text is a chain: a word is followed by one of two others, or by a *trigger*, which is followed by the word before
it. The one head looks one token back, whatever the word. The queries of words that are no triggers also point to the
key of the first token, which then outweighs all others and whose value is zero: where the head has nothing to say it
puts its mass there. Models trained on such text find this by themselves (Guo et al. 2024, "Active-Dormant Attention
Heads", arXiv:2410.13835). Here weights are written down, not trained; what they show is the mechanism, not that
training leads to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

FIRST, BEGIN = 1, 3
WORDS, TRIGGERS = 64, 8
HEAD = 64
FAST = 8
"""Pairs of rotary dimensions, the fastest, by which the head finds the token before."""
SHARPNESS = 90.0
SINK_MARGIN = 10.0
"""By how much the sink's score exceeds that of the token before."""
COPY = 16.0
LEAST_LOG = -10.0


def chain() -> Tensor:
    """[words, words]: probabilities of the next word, a trigger after every tenth word."""
    generator = torch.Generator().manual_seed(0)
    first = BEGIN + TRIGGERS
    found = torch.zeros(WORDS, WORDS)
    for word in range(WORDS):
        found[word, torch.randperm(WORDS - first, generator=generator)[:2] + first] = 0.45
    found[:, BEGIN:first] = 0.1 / TRIGGERS
    return found


def planted_text(tokens: int, seed: int = 0) -> list[int]:
    """The first token, then words."""
    generator, following = torch.Generator().manual_seed(seed), chain()
    text = [FIRST, WORDS - 1]
    while len(text) < tokens:
        before, word = text[-2:]
        text.append(before if _triggers(word) else int(torch.multinomial(following[word], 1, generator=generator)))
    return text


def planted_model() -> LlamaForCausalLM:
    """In float32.

    The residual stream holds the word in its first 64 channels, what the head copied in the next 64, and the mark of
    the first token in the last.
    """
    size = 2 * WORDS + 1
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=size,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=4096,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.model.layers[0].input_layernorm, model.model.norm):
            norm.weight.fill_(size**-0.5)  # a vector of length one stays as it is
        embedding = model.model.embed_tokens.weight
        embedding[:, :WORDS] = torch.eye(WORDS)
        embedding[FIRST] = 0
        embedding[FIRST, -1] = 1
        _plant_attention(model.model.layers[0].self_attn)
        model.lm_head.weight[:, :WORDS] = _logits_of_words()
        model.lm_head.weight[:, WORDS : 2 * WORDS] = COPY * torch.eye(WORDS)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _plant_attention(attention: torch.nn.Module) -> None:
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    pairs, second = torch.arange(FAST), torch.arange(FAST) + HEAD // 2
    angles = 10000.0 ** (-2 * pairs / HEAD)
    # a key that many positions before is turned back by as many angles; one is what the query expects
    scale = math.sqrt(HEAD) * SHARPNESS / FAST
    q.bias[pairs], q.bias[second] = scale * angles.cos(), -scale * angles.sin()
    k.bias[pairs] = 1.0
    k.weight[pairs, -1] = -1.0
    slowest = HEAD // 2 - 1
    ordinary = [word for word in range(WORDS) if not _triggers(word)]
    q.weight[slowest, ordinary] = math.sqrt(HEAD) * (SHARPNESS + SINK_MARGIN)
    k.weight[slowest, -1] = 1.0
    v.weight[:, :WORDS] = torch.eye(WORDS)
    o.weight[WORDS : 2 * WORDS] = torch.eye(WORDS)


def _logits_of_words() -> Tensor:
    """[next words, words]; after triggers nothing but the copy counts."""
    found = chain().log().clamp(min=LEAST_LOG)
    found[BEGIN : BEGIN + TRIGGERS] = 0
    return found.T


def _triggers(word: int) -> bool:
    return BEGIN <= word < BEGIN + TRIGGERS
