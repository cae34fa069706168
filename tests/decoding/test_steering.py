"""What every method that changes the decoded distribution must do, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.decoding import Decoder, Sampling, Speculative

from .cases import STEERING, Case

PROMPTS = ([5, 6, 7, 8, 9, 10], [11], [12, 13, 14])


@pytest.fixture(scope="module")
def models() -> Mapping[str, PreTrainedModel]:
    """The small trained model, and one that has been moved a little."""
    mini, tuned = (tt.load("ref-mini", dtype=torch.float32) for _ in range(2))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=noise))
    return {"ref-mini": mini, "tuned": tuned}


@pytest.fixture(params=STEERING, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_it_changes_what_is_decoded_and_a_seed_repeats_it(case: Case, models: Mapping[str, PreTrainedModel]) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    decoder = Decoder(models["ref-mini"], [case.method()], drafts=models)
    found = decoder.generate(PROMPTS, sampling)
    assert decoder.generate(PROMPTS, sampling).tokens == found.tokens
    assert [len(tokens) for tokens in found.tokens] == [8, 8, 8]
    assert found.tokens != Decoder(models["ref-mini"]).generate(PROMPTS, sampling).tokens


def test_the_first_text_is_the_same_alone(case: Case, models: Mapping[str, PreTrainedModel]) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8, stop_tokens=tuple(range(100, 1000)))
    decoder = Decoder(models["ref-mini"], [case.method()], drafts=models)
    together = decoder.generate(PROMPTS, sampling)
    assert decoder.generate(PROMPTS[:1], sampling).tokens[0] == together.tokens[0]


def test_greedy_drafts_change_nothing(case: Case, models: Mapping[str, PreTrainedModel]) -> None:
    method = case.method()
    if not method.lossless:
        pytest.skip("a search among samples")
    sampling = Sampling(max_new_tokens=16)
    drafts = Speculative(draft="tuned", depth=3)
    drafted = Decoder(models["ref-mini"], [method, drafts], drafts=models, adapt=False).generate(PROMPTS, sampling)
    plain = Decoder(models["ref-mini"], [method], drafts=models).generate(PROMPTS, sampling)
    assert drafted.tokens == plain.tokens
    assert sum(drafted.ledger.accepted_by_depth) > 0
