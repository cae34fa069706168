"""Small random models and a small byte-level tokenizer, for tests that need no trained weights."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = (
    "The king of the hill was old, and the road to the hill was long. Question: what is the name of the river? "
    "Answer: the river has no name. Notes: apple = red, plum = blue. 12+30=42\n She said that the song was good.\n"
) * 20


def small_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=128
    )


def small_model(seed: int = 0, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return small_model()
