"""Batching, padding and merging change no answer; encoding follows the likelihood rules; budgets are guarded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.core.errors import BudgetError, ConfigError, DataError, NumericsError
from trimtab.evaluation.base import Generate, LogLikelihood, Request, Score
from trimtab.evaluation.client import LocalClient
from trimtab.evaluation.encoding import Encoder, Scored, forwards
from trimtab.evaluation.stop_strings import StopFilter, cut_at_stop

from .conftest import CORPUS, small_model, small_tokenizer

WORDS = CORPUS[:300].split()
REQUESTS: list[Request] = [
    *(LogLikelihood(" ".join(WORDS[: 3 + 4 * i]), f" {WORDS[5 + i]} {WORDS[i]}", ends=True) for i in range(8)),
    LogLikelihood("", "The king"),
    LogLikelihood("The king ", "of"),
    *(Score(CORPUS[: 90 + 211 * i]) for i in range(4)),
]


def log_prob_by_hand(model: LlamaForCausalLM, ids: list[int], start: int) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))


@pytest.mark.parametrize("bos", [True, False])
def test_batch_of_one_equals_batch_of_many(model: LlamaForCausalLM, bos: bool) -> None:
    tokenizer = small_tokenizer(bos)
    together = LocalClient(model, tokenizer, batch_tokens=1024).run(REQUESTS)
    alone = [LocalClient(model, tokenizer, batch_tokens=1).run([request])[0] for request in REQUESTS]
    for a, b in zip(together, alone, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)
        assert (a.tokens, a.is_greedy, a.next_text) == (b.tokens, b.is_greedy, b.next_text)


def test_log_likelihood_is_that_of_the_plain_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    client = LocalClient(model, tokenizer)
    ids = tokenizer("The road to the hill")["input_ids"]
    head = len(tokenizer("The road to")["input_ids"])
    (response,) = client.run([LogLikelihood("The road to", " the hill")])
    assert response.log_prob == pytest.approx(log_prob_by_hand(model, ids, head), abs=1e-4)
    assert response.tokens == len(ids) - head
    (spaced,) = client.run([LogLikelihood("The road to ", "the hill")])  # the space moves to the continuation
    assert spaced.log_prob == pytest.approx(response.log_prob, abs=1e-6)
    (empty,) = client.run([LogLikelihood("", "The road")])
    assert empty.log_prob == pytest.approx(log_prob_by_hand(model, tokenizer("The road")["input_ids"], 1), abs=1e-4)


def test_models_without_logits_to_keep(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=128, n_embd=32, n_layer=1, n_head=2)).eval()
    client = LocalClient(gpt2, tokenizer)
    with_it = client.run(REQUESTS)
    client._keeps_logits = False
    for a, b in zip(with_it, client.run(REQUESTS), strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (7, 1), (100, 50)])
def test_sliding_window_scores_each_token_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> None:
    text = CORPUS[:300]
    parts = Encoder(tokenizer).windows(0, text, window, stride)
    ids = tokenizer(text)["input_ids"]
    scored = [token for part in parts for token in part.ids[part.start :]]
    assert scored == ids[1:]
    assert all(len(part.inputs) <= window for part in parts)
    assert all(part.start >= min(window - stride, 1) for part in parts)
    assert parts[0].ids[0] == tokenizer.bos_token_id
    (response,) = LocalClient(model, tokenizer, window=window, stride=stride).run([Score(text)])
    by_hand = sum(log_prob_by_hand(model, list(part.ids), part.start) for part in parts)
    assert response.log_prob == pytest.approx(by_hand, abs=1e-3)
    assert response.tokens == len(ids) - 1


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=6), min_size=1, max_size=12),
    st.data(),
)
def test_forwards_serve_every_item_from_a_row_that_begins_with_it(
    sequences: list[list[int]], data: st.DataObject
) -> None:
    items = [Scored(i, tuple(s), 1, data.draw(st.booleans())) for i, s in enumerate(sequences)]
    rows = forwards(items)
    assert sorted(item.request for row in rows for item in row.served) == list(range(len(items)))
    for row in rows:
        assert all(row.inputs[: len(item.inputs)] == item.inputs for item in row.served)
    inputs = [row.inputs for row in rows]
    for one in inputs:
        assert sum(other[: len(one)] == one for other in inputs) == 1  # no row could have been spared


def test_choices_of_one_token_cost_one_row(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    items = [encoder.continuation(i, "The song was", w, ends=False) for i, w in enumerate((" a", " b", " c"))]
    assert len(forwards(items)) == 1
    assert len(forwards([encoder.continuation(i, "x", w, ends=True) for i, w in enumerate((" a", " b"))])) == 2


def test_encoding_that_is_no_prefix_is_piecewise_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    whole = encoder.continuation(0, "the riv", "er", ends=False)
    assert encoder.piecewise == 1
    assert whole.ids[1:] == (*encoder.ids("the riv"), *encoder.ids("er"))
    encoder.continuation(0, "the", " river", ends=False)
    assert encoder.piecewise == 1


GENERATE = [Generate(" ".join(WORDS[: 2 + 3 * i]), 12, (".", "\n")) for i in range(8)]


def test_greedy_text_does_not_depend_on_the_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    together = LocalClient(model, tokenizer).run(GENERATE)
    alone = [LocalClient(model, tokenizer, batch_tokens=1).run([request])[0] for request in GENERATE]
    assert together == alone
    assert any(response.text for response in together)
    assert not any("." in response.text for response in together)


def test_teacher_forcing_tells_what_greedy_decoding_writes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    client = LocalClient(model, tokenizer)
    checked = 0
    encoder = Encoder(tokenizer)
    for request in (Generate(r.prompt, n, ()) for r in GENERATE for n in (1, 2, 3)):
        (free,) = client.run([request])
        if not free.text or encoder.continuation(0, request.prompt, free.text, False).ids[1:] != tuple(
            encoder.ids(request.prompt) + encoder.ids(free.text)
        ):
            continue
        if len(encoder.ids(free.text)) != request.max_new_tokens:
            continue  # the same text in other tokens, which teacher forcing rightly takes for another way
        right, wrong = client.run(
            [
                LogLikelihood(request.prompt, free.text, ends=True),
                LogLikelihood(request.prompt, "Q" if free.text[0] != "Q" else "R", ends=True),
            ]
        )
        (longer,) = client.run([Generate(request.prompt, request.max_new_tokens + 1, ())])
        assert right.is_greedy
        assert longer.text == free.text + (right.next_text or "")
        assert not wrong.is_greedy
        checked += 1
    assert checked >= 3


def test_stop_strings_across_tokens_and_per_row(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    client = LocalClient(model, tokenizer)
    free = client.run([Generate(request.prompt, 12, ()) for request in GENERATE])
    stops = [response.text[3:6] for response in free]
    cut = client.run([Generate(r.prompt, 12, (s,)) for r, s in zip(GENERATE, stops, strict=True)])
    for before, stop, after in zip(free, stops, cut, strict=True):
        assert after.text == before.text[: before.text.index(stop)]
        assert after.tokens <= before.tokens


@given(st.text("ab\n#", max_size=30), st.lists(st.text("ab\n#", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_filter_lets_through_exactly_what_stands_before_the_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    gate, out, at = StopFilter(stops), "", 0
    first = min((text.index(s) for s in stops if s in text), default=len(text))
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        out += gate.feed(text[at : at + size])
        at += size
        assert text[:first].startswith(out)  # nothing of a stop string ever gets out
    assert out + gate.flush() == text[:first] == cut_at_stop(text, stops)
    assert gate.stopped == any(s in text for s in stops)


def test_budget_guard(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    client = LocalClient(model, tokenizer)
    long = " the" * 126
    assert client.run([LogLikelihood(long, " hill")])[0].tokens == 1
    with pytest.raises(BudgetError, match=r"prompt of 127 tokens and max_new_tokens=9.*context of 128"):
        client.run([Generate(long, 9)])
    with pytest.raises(BudgetError, match="does not fit the model's context of 128"):
        client.run([LogLikelihood(long, " hill hill hill hill", ends=True)])
    cutting = LocalClient(model, tokenizer, overflow="truncate")
    assert cutting.run([LogLikelihood(long * 2, " hill")])[0].tokens == 1
    assert cutting.truncated == 1


def test_refusals(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    client = LocalClient(model, tokenizer)
    with pytest.raises(DataError, match="empty continuation"):
        client.run([LogLikelihood("The king", "")])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        client.run([Generate("The king", 0)])
    broken = small_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        LocalClient(broken, tokenizer).run([Score("The king")])


def test_the_mode_of_the_model_is_restored(tokenizer: PreTrainedTokenizerFast) -> None:
    model = small_model(attention_dropout=0.5).train()
    client = LocalClient(model, tokenizer)
    assert client.run(REQUESTS[:2]) == client.run(REQUESTS[:2])
    assert model.training
    assert client.run([]) == []
