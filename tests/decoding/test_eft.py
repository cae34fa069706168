"""Emulated fine-tuning: the formula, exact with drafts, with models that must have the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CompositionError
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._reader import Rows
from trimtab.decoding._transforms.eft import TUNED, UNTUNED, EftTransform
from trimtab.decoding.eft import Eft
from trimtab.models.random import random_model


def test_the_formula() -> None:
    base, tuned, untuned = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 3.0]])
    rows = Rows(base, others={TUNED: tuned, UNTUNED: untuned})
    found = EftTransform(2.0)(rows.logits, rows, lambda row: [])
    torch.testing.assert_close(found, torch.tensor([[2.0, -4.0]]))


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return tt.load("ref-mini", dtype=torch.float32)


def test_no_difference_and_no_share_of_it_leave_the_model(mini: PreTrainedModel) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    prompts = [[5, 6, 7], [8]]
    plain = Decoder(mini).generate(prompts, sampling).tokens
    other = random_model("llama", vocab_size=mini.config.vocab_size)
    for method in (Eft(tuned="a", untuned="a"), Eft(tuned="a", untuned="b", beta=0.0)):
        assert Decoder(mini, [method], drafts={"a": mini, "b": other}).generate(prompts, sampling).tokens == plain
    # much of it: a random model's logits are small beside those of a trained one
    moved = Decoder(mini, [Eft(tuned="b", untuned="a", beta=3.0)], drafts={"a": mini, "b": other})
    assert moved.generate(prompts, sampling).tokens != plain


def test_a_model_tuned_to_itself_is_the_tuned_model(mini: PreTrainedModel) -> None:
    """base = untuned and beta 1: what is left is the tuned one, greedily and with drafts."""
    tuned = random_model("llama", vocab_size=mini.config.vocab_size)
    named = {"tuned": tuned, "base": mini}
    method = Eft(tuned="tuned", untuned="base")
    sampling = Sampling(max_new_tokens=12)
    wanted = Decoder(tuned).generate([[5, 6], [7]], sampling).tokens
    assert Decoder(mini, [method], drafts=named).generate([[5, 6], [7]], sampling).tokens == wanted
    drafted = Decoder(mini, [method, Speculative(draft="tuned", depth=3)], drafts=named, adapt=False)
    done = drafted.generate([[5, 6], [7]], sampling)
    assert done.tokens == wanted
    assert sum(done.ledger.accepted_by_depth) > 0


def test_refuses_other_tokens(mini: PreTrainedModel) -> None:
    named = {"other": random_model("llama"), "same": mini}
    with pytest.raises(CompositionError, match=r"'other' must have the tokenizer .*: it has 131 tokens, .* has 4096"):
        Decoder(mini, [Eft(tuned="other", untuned="same")], drafts=named)
