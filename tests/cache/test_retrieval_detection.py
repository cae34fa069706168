"""Detection of retrieval heads: right where the only copying head is known, and independent of what must not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from tests.cache.retrieval_toy import HAYSTACK, NEEDLE, toy_model, toy_tokenizer
from trimtab.cache._retrieval.detection import answer_of, answers, detect, eager_attention, mark_copies
from trimtab.cache._retrieval.scores import HeadScores
from trimtab.cache._retrieval.trials import Trial, make_trials
from trimtab.core.errors import BudgetError, ConfigError, DataError, NumericsError
from trimtab.models.random import ALL_FAMILIES, random_model


@pytest.fixture(scope="module")
def toy_trials() -> tuple[Trial, ...]:
    return make_trials(
        toy_tokenizer(), (20, 40), depths=(0.0, 0.5, 1.0), repeats=1, needles=[NEEDLE], haystack=HAYSTACK
    )


@pytest.fixture(scope="module")
def ref_trials(ref_tokenizer: object) -> tuple[Trial, ...]:
    return make_trials(ref_tokenizer, (200,), depths=(0.1, 0.5, 0.9), repeats=2)


@pytest.fixture(scope="module")
def ref_float(ref_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(ref_model).float()


@pytest.fixture(scope="module")
def ref_scores(ref_float: PreTrainedModel, ref_trials: tuple[Trial, ...]) -> HeadScores:
    return detect(ref_float, ref_trials)


@pytest.mark.parametrize("head", [0, 1])
def test_only_the_induction_head_scores(head: int, toy_trials: tuple[Trial, ...]) -> None:
    scores = detect(toy_model(head), toy_trials, tokenizer=toy_tokenizer())
    expected = torch.zeros(2, 2, dtype=torch.float64)
    expected[1, head] = 1.0
    assert len(scores.counted) == len(toy_trials)
    assert torch.equal(scores.scores, expected)
    assert scores.retrieval_heads == ((1, head),)


def test_nothing_answered_is_an_error(toy_trials: tuple[Trial, ...]) -> None:
    model = toy_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.zero_()
    with pytest.raises(DataError, match="undefined: it answered none of 6 trials"):
        detect(model, toy_trials, tokenizer=toy_tokenizer())


def test_permuted_heads_have_permuted_scores(
    ref_float: PreTrainedModel, ref_scores: HeadScores, ref_trials: tuple[Trial, ...]
) -> None:
    permuted = copy.deepcopy(ref_float)
    order = [1, 0, 3, 2]  # within the groups that share a KV head
    with torch.no_grad():
        for layer in permuted.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.copy_(attention.q_proj.weight.view(4, 64, 256)[order].reshape(256, 256))
            attention.o_proj.weight.copy_(attention.o_proj.weight.view(256, 4, 64)[:, order].reshape(256, 256))
    first, second = ref_scores.scores, detect(permuted, ref_trials).scores
    assert first.max() > 0.5
    assert torch.equal(first[:, order], second)
    assert not torch.equal(first, second)


def test_scores_do_not_depend_on_the_kernel_of_the_prefill(
    ref_float: PreTrainedModel, ref_scores: HeadScores, ref_trials: tuple[Trial, ...]
) -> None:
    assert ref_float.config._attn_implementation == "sdpa"
    with eager_attention(ref_float):
        assert detect(ref_float, ref_trials) == ref_scores
        assert ref_float.config._attn_implementation == "eager"
    assert ref_float.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_are_those_of_the_whole_forward_pass(family: str) -> None:
    """Also where attention slides: position i of a row is token i of the prompt."""
    options = {"sliding_window": 8} if family in ("mistral", "gemma2", "gemma3") else {}
    model = random_model(family, eos_token_id=None, **options)
    before = model.config._attn_implementation
    prompt = tuple(torch.randint(3, 131, (24,), generator=torch.Generator().manual_seed(1)).tolist())
    trial = Trial(prompt=prompt, span=(4, 6), answer="x", stops=(), depth=0.0)
    seen: list[tuple[tuple[torch.Tensor, ...], int]] = []
    answer_of(model, toy_tokenizer(), trial, 3, lambda rows, token: seen.append((rows, token)))
    assert model.config._attn_implementation == before
    with eager_attention(model), torch.no_grad():
        ids = torch.tensor([[*prompt, *(token for _, token in seen[:-1])]])
        whole = model(input_ids=ids, output_attentions=True, use_cache=False)
    for step, (rows, token) in enumerate(seen):
        at = len(prompt) - 1 + step
        assert token == int(whole.logits[0, at].argmax())
        for row, expected in zip(rows, whole.attentions, strict=True):
            torch.testing.assert_close(row[0, :, 0], expected[0, :, at, : at + 1], rtol=1e-4, atol=1e-5)


def test_a_copy_needs_place_and_token() -> None:
    prompt, span = (7, 8, 9, 8, 5), (1, 4)
    copied = torch.zeros(1, 4, 3, dtype=torch.bool)
    position = torch.tensor([[1, 3, 2, 4]])  # token 8, token 8, token 9, outside of the span
    mark_copies(copied, position, 8, prompt, span)
    assert copied[0].int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    mark_copies(copied, position, 8, prompt, span)  # copied again: counts once
    assert copied.sum() == 2
    mark_copies(copied, position, 5, prompt, span)  # the right token, outside of the span
    assert copied.sum() == 2


@pytest.mark.parametrize(
    ("text", "answer", "given"),
    [
        (" gold", " gold", True),
        (" gold mine", " gold", True),
        (" not gold", " gold", False),
        ("", " gold", False),
        (" red gold", " red gold wax", True),
        (" red red", " red gold wax", False),
        (" red gold", " red gold wax iron", False),
    ],
)
def test_what_counts_as_an_answer(text: str, answer: str, given: bool) -> None:
    assert answers(text, answer) is given


def test_nan_and_long_prompts_are_named(toy_trials: tuple[Trial, ...]) -> None:
    model = toy_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="attention weights are NaN"):
        detect(model, toy_trials, tokenizer=toy_tokenizer())
    assert model.config._attn_implementation == "sdpa"
    long = Trial(prompt=(3,) * 47, span=(0, 3), answer="x", stops=(), depth=0.0)
    with pytest.raises(BudgetError, match="context of 48 tokens"):
        detect(toy_model(), [long], tokenizer=toy_tokenizer())
    with pytest.raises(ConfigError, match="not 0 and 50"):
        detect(toy_model(), [], tokenizer=toy_tokenizer())


def test_scores_of_ref_are_sparse(ref_scores: HeadScores) -> None:
    scores = ref_scores.scores
    assert len(ref_scores.counted) >= 4
    assert torch.all((scores >= 0) & (scores <= 1))
    assert 1 <= len(ref_scores.retrieval_heads) <= 8
