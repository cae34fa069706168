"""`generate` in all its modes gives with an exact cache what it gives with transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trimtab.core.errors import CompositionError
from trimtab.models.random import random_model

from .plans import new_cache, tokens

FAMILIES = ["llama", "gemma2", "gpt2"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = random_model(str(request.param))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def both(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens generated with an exact SegmentCache and with a DynamicCache."""
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    found = []
    for cache in (new_cache(model), DynamicCache(config=model.config)):
        torch.manual_seed(5)
        found.append(model.generate(ids, past_key_values=cache, **options))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20, "temperature": 1.5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
    ],
    ids=["greedy", "sampling", "beams", "several", "chunked"],
)
def test_modes(model: PreTrainedModel, options: dict[str, Any]) -> None:
    found, wanted = both(model, tokens(2, 19), **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_batches(model: PreTrainedModel, beams: int) -> None:
    ids, mask = tokens(3, 21), torch.ones((3, 21), dtype=torch.long)
    mask[0, :9], mask[1, :1] = 0, 0
    found, wanted = both(model, ids, attention_mask=mask, num_beams=beams)
    assert torch.equal(found, wanted)


def test_conversation(model: PreTrainedModel) -> None:
    outputs = []
    for cache in (new_cache(model), DynamicCache(config=model.config)):
        text = tokens(1, 12)
        for turn in range(3):
            text = model.generate(text, past_key_values=cache, max_new_tokens=9, do_sample=False)
            text = torch.cat([text, tokens(1, 8, seed=turn + 10)], dim=1)
        outputs.append(text)
    assert torch.equal(outputs[0], outputs[1])


def test_prompt_lookup(model: PreTrainedModel) -> None:
    ids = tokens(1, 10).repeat(1, 3)
    found, wanted = both(model, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(found, wanted)


def test_assisted(model: PreTrainedModel) -> None:
    found, _ = both(model, tokens(1, 15))
    cache = new_cache(model)
    helper = random_model("llama", seed=4)
    helper.generation_config.eos_token_id = None
    assisted = model.generate(
        tokens(1, 15), past_key_values=cache, assistant_model=helper, max_new_tokens=20, do_sample=False
    )
    assert torch.equal(assisted, found)


def test_assisted_with_encoded_tokens_refuses() -> None:
    """Rejected tokens that are encoded already cannot be taken back: an error, never a wrong text."""
    model, ids = random_model("llama"), tokens(1, 10).repeat(1, 6)
    model.generation_config.eos_token_id = None
    options = {"prompt_lookup_num_tokens": 8, "max_new_tokens": 60, "do_sample": False}
    with pytest.raises(CompositionError, match="cache.begin"):
        model.generate(ids, past_key_values=new_cache(model, "kivi"), **options)


def test_deterministic_and_reset() -> None:
    model, ids = random_model("llama"), tokens(2, 50)
    cache = new_cache(model, "kivi")
    first = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    again = model.generate(ids[:1], past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(again, first[:1])
