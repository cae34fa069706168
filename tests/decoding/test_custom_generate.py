"""Methods as a custom_generate of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from trimtab.cache.kivi import Kivi
from trimtab.core.errors import CompositionError
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._controller import Controller
from trimtab.models.random import random_model

METHOD = Speculative(draft="self:4bit", depth=3)
IDS = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(0))


def test_greedy_is_what_generate_writes() -> None:
    model = random_model("llama")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, custom_generate=METHOD, **options), wanted)


def test_padded_prompts() -> None:
    model, mask = random_model("llama"), torch.ones_like(IDS)
    mask[1, :5] = 0
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, custom_generate=METHOD, **options), wanted)


def test_settings_of_generate_hold() -> None:
    model = random_model("llama")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.5}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, custom_generate=METHOD, **options), wanted)
    stop = int(wanted[0, 15])
    stopped = model.generate(IDS[:1], custom_generate=METHOD, eos_token_id=stop, **options)
    assert torch.equal(stopped, model.generate(IDS[:1], eos_token_id=stop, **options))


def test_sampling_follows_the_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts in every round: which rounds have one is a matter of measured times."""
    monkeypatch.setattr(Controller, "wants_draft", lambda self: True)
    model = random_model("llama")
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "pad_token_id": 0}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(IDS, custom_generate=METHOD, **options))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


class _NoRepeat(LogitsProcessor):
    """Forbids the last token of the prefix, which inside a draft is a drafted one."""

    def __call__(self, input_ids, scores):  # type: ignore[no-untyped-def]
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


def test_processors_see_drafted_prefixes() -> None:
    model = random_model("llama")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "logits_processor": [_NoRepeat()]}
    wanted = model.generate(IDS[:1], **options)
    assert torch.equal(model.generate(IDS[:1], custom_generate=METHOD, **options), wanted)


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):  # type: ignore[no-untyped-def]
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_what_cannot_be_kept_is_refused() -> None:
    model = random_model("llama")
    options = {"max_new_tokens": 4, "pad_token_id": 0, "custom_generate": METHOD}
    with pytest.raises(CompositionError, match="_Never cannot see inside a draft"):
        model.generate(IDS, stopping_criteria=[_Never()], **options)
    with pytest.raises(CompositionError, match="num_return_sequences=2"):
        model.generate(IDS, num_return_sequences=2, do_sample=True, **options)
    with pytest.raises(CompositionError, match="return_dict_in_generate"):
        model.generate(IDS, return_dict_in_generate=True, **options)


def test_a_cache_that_is_given_is_used() -> None:
    model = random_model("llama", head_dim=16)
    cache = Kivi(bits=2, group_size=16, window=64).new(model)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "custom_generate": METHOD}
    found = model.generate(IDS[:1], past_key_values=cache, **options)
    assert cache.get_seq_length() == found.shape[1] - 1
    wanted = Decoder(model, [METHOD], new_cache=Kivi(bits=2, group_size=16, window=64).new).generate(
        IDS[:1].tolist(), Sampling(max_new_tokens=40)
    )
    assert found[:, 12:].tolist() == wanted.tokens
    for held in (cache, DynamicCache(config=model.config)):
        if held is not cache:
            model(IDS[:1], past_key_values=held)
        with pytest.raises(CompositionError, match="begins with an empty one"):
            model.generate(torch.cat([IDS, IDS], dim=1)[:1], past_key_values=held, **options)
