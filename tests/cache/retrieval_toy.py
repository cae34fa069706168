"""A hand-built model of two attention layers whose only skill is copying: one induction head, whose place is known."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trimtab.cache._retrieval.trials import Needle

WORDS = "<|end|> . ? the of and a key lock red blue green gold iron wax north south east west up down left right far"
TOKENS = len(WORDS.split())
POSITIONS = 2 * TOKENS
SHARP = 40.0
NEEDLE = Needle(before="lock key", answer=" red gold wax", after=" .", question=" ? key", stops=(".",))
HAYSTACK = "the of and a . " * 12


def toy_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", model_max_length=POSITIONS)


def toy_model(induction_head: int = 1) -> GPT2LMHeadModel:
    """Layer 0, head 0 writes down each token's predecessor. Head `induction_head` of layer 1 attends to the tokens
    whose predecessor is the present token, and predicts them. The other two heads do nothing.

    Channels: the token, its position, and the predecessor that layer 0 writes.
    """
    width = TOKENS + POSITIONS + TOKENS
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_inner=1,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).eval()
    size = width // 2
    token, position, before = slice(0, TOKENS), slice(TOKENS, TOKENS + POSITIONS), slice(TOKENS + POSITIONS, width)

    def part(role: int, head: int, channels: int) -> slice:
        return slice(role * width + head * size, role * width + head * size + channels)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, token] = torch.eye(TOKENS)
        model.transformer.wpe.weight[:, position] = torch.eye(POSITIONS)
        first, second = model.transformer.h[0].attn, model.transformer.h[1].attn
        # where a query of position i - 1 meets the key of position i
        first.c_attn.weight[position, part(0, 0, POSITIONS)] = SHARP * torch.eye(POSITIONS).roll(-1, dims=1)
        first.c_attn.weight[position, part(1, 0, POSITIONS)] = torch.eye(POSITIONS)
        first.c_attn.weight[token, part(2, 0, TOKENS)] = torch.eye(TOKENS)
        first.c_proj.weight[:TOKENS, before] = torch.eye(TOKENS)
        head = induction_head
        second.c_attn.weight[token, part(0, head, TOKENS)] = SHARP * torch.eye(TOKENS)
        second.c_attn.weight[before, part(1, head, TOKENS)] = torch.eye(TOKENS)
        second.c_attn.weight[token, part(2, head, TOKENS)] = torch.eye(TOKENS)
        second.c_proj.weight[head * size : head * size + TOKENS, token] = 3.0 * torch.eye(TOKENS)
    return model
