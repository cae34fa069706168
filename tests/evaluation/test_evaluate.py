"""Tasks ask what they say, results carry intervals, and a model compared with itself has lost nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import world
from trimtab.core.errors import BudgetError, ConfigError, DataError, NumericsError
from trimtab.core.registry import methods
from trimtab.evaluation import NextTokens, compare, evaluate, fidelity, task, task_names, to_json
from trimtab.evaluation.base import Document, LogLikelihood, Response, Score
from trimtab.evaluation.tasks._prose import pieces

from .conftest import CORPUS, small_model

NEAR = ["facts", "openbook", "format", "arithmetic", "sentiment"]


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """A random model with room for the long documents."""
    return small_model(max_position_embeddings=16384, num_hidden_layers=1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


def test_names_come_from_the_folder() -> None:
    assert set(task_names()) == {"prose", "recall", "facts", "openbook", "format", "arithmetic", "sentiment"}
    for name in task_names():
        made = task(name)
        assert made.name == name
        assert made.summary
    assert not set(task_names()) & set(methods())


def test_unknown_names_are_refused_with_a_suggestion(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'recal'. Did you mean 'recall'"):
        evaluate(model, ["recal"], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"task 'recall' has no option 'record'. Did you mean 'records'"):
        task("recall", record=3)
    with pytest.raises(ConfigError, match="only"):
        evaluate(model, ["facts"], tokenizer=tokenizer, text="x.txt")
    with pytest.raises(ConfigError, match="twice"):
        evaluate(model, ["facts", "facts"], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="limit"):
        evaluate(model, ["facts"], tokenizer=tokenizer, limit=0)


@pytest.mark.parametrize("name", NEAR)
def test_documents_are_held_out_and_seeded(name: str) -> None:
    made = task(name)
    first, again, other = made.documents(40, 0), made.documents(40, 0), made.documents(40, 1)
    assert [d.id for d in first] == [d.id for d in again]
    assert [d.id for d in first] != [d.id for d in other]
    assert len(first) == 40
    texts = {(e.prompt, e.answer) for e in world.examples(name, "eval", 40, 0)}
    assert {(d.fields["prompt"], d.fields["answer"]) for d in first} == texts


def oracle(name: str, documents: Sequence[Document], spoil: bool) -> list[Mapping[str, Response]]:
    """Responses of a model that knows every answer, or (spoilt) goes on writing after it."""
    made, answers = task(name), []
    for document in documents:
        responses = {}
        for role, request in made.requests(document).items():
            assert isinstance(request, LogLikelihood)
            right = request.continuation == document.fields["answer"]
            responses[role] = Response(-0.1 if right else -3.0, 1, right, next_text=" more" if spoil else "\n")
        answers.append(responses)
    return answers


@pytest.mark.parametrize("name", [*NEAR, "recall"])
def test_exact_match_needs_the_answer_and_its_end(name: str) -> None:
    made = task(name)
    documents = made.documents(24, 0)
    for spoil in (False, True):
        scores = [made.score(d, r) for d, r in zip(documents, oracle(name, documents, spoil), strict=True)]
        names = {n for score in scores for n in score}
        estimates = made.estimate(documents, {n: [score.get(n) for score in scores] for n in names})
        for metric, estimate in estimates.items():
            if metric == "answer_nats":
                assert estimate.value == pytest.approx(0.1)
            else:
                assert estimate.value == (0.0 if spoil and name != "sentiment" else 1.0)
                assert estimate.low < estimate.high
        expected = sum(estimates[m].n for m in estimates if m != "answer_nats")
        assert expected == len(documents)
        assert set(estimates) == set(made.higher_is_better)


def test_far_recall_asks_about_records_that_stand_before_the_prose() -> None:
    documents = [d for d in task("recall").documents(16, 0) if d.fields["metric"] == "exact_match_far"]
    assert len(documents) == 16
    assert len({d.cluster for d in documents}) == 2
    for document in documents:
        prompt, answer = document.fields["prompt"], document.fields["answer"]
        key = prompt.rpartition(" ")[0].rpartition(" ")[2]
        records = prompt[: prompt.index(".\n")]
        assert f"{key} ={answer}" in records
        assert 5000 < len(prompt) - len(records) < 5700
    assert documents[1].fields["prompt"].startswith(documents[0].fields["prompt"])
    assert not [d for d in task("recall", distance=0).documents(8, 0) if d.fields["metric"] == "exact_match_far"]


def test_pieces_lose_nothing() -> None:
    for text, size in [(CORPUS, 100), ("one", 5), ("a b  \n c", 1), ("x" * 50, 7)]:
        cut = pieces(text, size)
        assert "".join(cut) == text
        assert all(len(piece) >= size for piece in cut[:-1])
        assert all(not piece[0].isspace() for piece in cut[1:])


def test_prose_is_bits_over_bytes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    made = task("prose", text=corpus, characters=200)
    result = evaluate(model, [made], tokenizer=tokenizer, limit=6)["prose"]
    nats = bytes_ = tokens = 0.0
    for document in made.documents(6, 0):
        text = document.fields["text"]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)
        nats -= float(log_probs[0, :-1].gather(1, ids[0, 1:, None]).sum())
        bytes_ += len(text.encode())
        tokens += ids.shape[1] - 1
    assert result.metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / bytes_, rel=1e-5)
    assert result.metrics["perplexity_per_token"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    for estimate in result.metrics.values():
        assert estimate.low < estimate.value < estimate.high


def test_own_text_is_read_and_bad_text_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cases = {"empty.txt": b" \n", "latin.txt": "caf\u00e9".encode("latin-1")}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            evaluate(model, "prose", tokenizer=tokenizer, text=tmp_path / name)
    with pytest.raises(DataError, match=r"missing.txt cannot be read"):
        evaluate(model, "prose", tokenizer=tokenizer, text=tmp_path / "missing.txt")


def test_json_and_batching(wide: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    results = evaluate(wide, tokenizer=tokenizer, limit=4)
    assert tuple(results) == task_names()
    data = json.loads(json.dumps(to_json(results), allow_nan=False))
    for name in task_names():
        assert set(data["tasks"][name]) == set(task(name).higher_is_better)
        for metric in data["tasks"][name].values():
            assert {"value", "low", "high"} <= set(metric)
    alone = evaluate(wide, "facts,sentiment", tokenizer=tokenizer, limit=4, batch_tokens=1)
    for name in ("facts", "sentiment"):
        assert alone[name].values["answer_nats"] == pytest.approx(results[name].values["answer_nats"], abs=1e-4)


def test_a_model_compared_with_itself_has_lost_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path
) -> None:
    made = task("prose", text=corpus, characters=200)
    results = evaluate(model, ["facts", "sentiment", made], tokenizer=tokenizer, limit=12, reference=model)
    comparisons = [c for result in results.values() for c in result.comparisons]
    assert {(c.task, c.metric) for c in comparisons} >= {("facts", "answer_nats"), ("prose", "bits_per_byte")}
    for comparison in comparisons:
        assert (comparison.difference.value, comparison.difference.low, comparison.difference.high) == (0, 0, 0)
        assert comparison.p_value == comparison.p_holm == 1
        assert comparison.gained in (None, 0)
        assert comparison.lost in (None, 0)
        if comparison.recovery:
            assert (comparison.recovery.value, comparison.recovery.low, comparison.recovery.high) == (1, 1, 1)
    same = fidelity(model, model, tokenizer=tokenizer, text=corpus, windows=4, length=32)
    assert same["kl_nats_per_token"].value == same["kl_nats_per_token"].high == 0
    assert same["top1_agreement"].value == 1
    assert same["gold_nats_change"].value == 0


def test_a_disturbed_model_is_told_from_its_reference(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    model, noisy = small_model(), small_model()
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base = evaluate(model, "facts,sentiment", tokenizer=tokenizer, limit=60)
    results = evaluate(noisy, "facts,sentiment", tokenizer=tokenizer, limit=60)
    for comparison in compare(base, results):
        a, b = (r[comparison.task].values[comparison.metric] for r in (base, results))
        gaps = [y - x for x, y in zip(a, b, strict=True)]
        assert comparison.difference.value == pytest.approx(sum(gaps) / len(gaps))
        assert comparison.p_holm >= comparison.p_value
        if comparison.gained is not None:
            assert (comparison.gained, comparison.lost) == (sum(g > 0 for g in gaps), sum(g < 0 for g in gaps))
    assert to_json(evaluate(noisy, "facts", tokenizer=tokenizer, limit=4, reference=model))["comparisons"]
    with pytest.raises(DataError, match="different documents"):
        compare(base, evaluate(noisy, "facts", tokenizer=tokenizer, limit=60, seed=1))


def test_fidelity_by_hand_and_from_kept_log_probs(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    model, other = small_model(0), small_model(1)
    kept = NextTokens.of(model, tokenizer=tokenizer, text=corpus, windows=5, length=24)
    live = fidelity(other, model, tokenizer=tokenizer, text=corpus, windows=5, length=24)
    assert fidelity(other, kept) == live
    with torch.no_grad():
        p, q = (m(kept.tokens[:, :-1]).logits.log_softmax(-1) for m in (model, other))
    by_hand = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel()
    assert live["kl_nats_per_token"].value == pytest.approx(float(by_hand), rel=1e-5)
    assert live["top1_agreement"].value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    gold = (p - q).gather(2, kept.tokens[:, 1:, None]).mean()
    assert live["gold_nats_change"].value == pytest.approx(float(gold), rel=1e-4)
    with pytest.raises(BudgetError, match=r"max_bytes=100,000 holds 2 windows"):
        NextTokens.of(model, tokenizer=tokenizer, text=corpus, windows=5, length=24, max_bytes=100_000)
    with pytest.raises(DataError, match="two windows"):
        fidelity(model, model, tokenizer=tokenizer, text=_short(corpus), length=128)
    with pytest.raises(ConfigError, match="one vocabulary"):
        fidelity(small_model(vocab_size=410), kept)
    broken = small_model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NumericsError):
        fidelity(broken, kept)


def _short(corpus: Path) -> Path:
    path = corpus.with_name("short.txt")
    path.write_text(CORPUS[:100], encoding="utf-8")
    return path


def test_long_documents_do_not_fit_a_short_context(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BudgetError, match="context of 128"):
        evaluate(model, "recall", tokenizer=tokenizer, limit=2)


def test_scores_are_requests_of_the_contract() -> None:
    made = task("prose", characters=500)
    (document, *_) = made.documents(1, 0)
    assert made.requests(document) == {"text": Score(document.fields["text"])}
