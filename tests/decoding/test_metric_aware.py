"""Scoring and sampling estimate what the model believes, and decisions come out of the front doors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.cache import Kivi
from trimtab.core.errors import CompositionError, ConfigError, DataError
from trimtab.decoding._decisions import estimates
from trimtab.decoding._decisions.labels import Continuations, LabelTrie
from trimtab.decoding._decisions.outcomes import value_in
from trimtab.decoding._decoder import Decoder
from trimtab.decoding._distribution import Prefixes
from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._reader import Rows
from trimtab.decoding._rules.token import TokenRule
from trimtab.decoding._sampling import Sampling
from trimtab.decoding.metric_aware import MetricAware
from trimtab.models import tokenizer_of

from .letters import LETTERS, letters_model

SUMS = ("23+45=", "91-17=", "8+94=", "70-69=")
NUMBERS = tuple(map(str, range(0, 120, 3)))


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return tt.load("ref-mini", dtype=torch.float32)


@pytest.fixture(scope="module")
def letters() -> PreTrainedModel:
    return letters_model(24)  # more than a third of its texts are numbers below 100, of many values


def one_by_one(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """log p of an answer by one plain forward pass over prompt and answer."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double()
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(log_probs[range(len(answer)), list(answer)].sum())


def encoded(model: PreTrainedModel, text: str) -> list[int]:
    return list(tokenizer_of(model)(text)["input_ids"])


def label_tokens(model: PreTrainedModel, text: str) -> list[int]:
    return list(tokenizer_of(model)(text, add_special_tokens=False)["input_ids"])


def test_scoring_a_trie_is_scoring_one_by_one(mini: PreTrainedModel) -> None:
    """Log-probabilities down to -40, where a float32 is no closer than 4e-6 to begin with."""
    found = MetricAware(metric="squared_error", labels=NUMBERS, lead="").decide(mini, SUMS)
    for prompt, own in zip(SUMS, found.outcomes, strict=True):
        answers = [label_tokens(mini, f"{n}\n") for n in NUMBERS]
        single = np.array([one_by_one(mini, encoded(mini, prompt), answer) for answer in answers])
        assert math.log(own.mass) == pytest.approx(np.logaddexp.reduce(single), abs=1e-5)
        np.testing.assert_allclose(np.log(own.weights * own.mass), single, atol=1e-5, rtol=1e-6)


def test_a_trie_is_one_forward_pass_over_fewer_tokens(mini: PreTrainedModel) -> None:
    found = MetricAware(metric="squared_error", labels=NUMBERS, lead="").decide(mini, SUMS)
    separate = sum(len(label_tokens(mini, f"{n}\n")) for n in NUMBERS)
    assert found.ledger.target_forwards == 1
    assert found.ledger.rounds == len(SUMS)
    assert found.calls_per_decision == 2
    prompt = float(np.mean([len(encoded(mini, p)) for p in SUMS]))
    # inner nodes alone: every number but the "\n" that ends it, beginnings shared
    beginnings = {n[:k] for n in NUMBERS for k in range(1, len(n) + 1)}
    assert found.tokens_per_decision == pytest.approx(prompt + len(beginnings))
    assert len(beginnings) < separate / 2


@pytest.mark.parametrize("labels", [("good", "bad"), ("good", "bad", "very good")])
def test_labels_that_are_words_follow_the_lead(mini: PreTrainedModel, labels: tuple[str, ...]) -> None:
    prompt = "Review: The inn was nice and the bed was poor.\nLabel:"
    own = MetricAware(labels=labels).decide(mini, [prompt]).outcomes[0]
    single = [math.exp(one_by_one(mini, encoded(mini, prompt), label_tokens(mini, f" {n}\n"))) for n in labels]
    assert own.mass == pytest.approx(sum(single), rel=1e-5)
    np.testing.assert_allclose(own.weights, np.array(single) / sum(single), rtol=1e-4)


def test_scores_are_those_of_the_decoded_distribution(letters: PreTrainedModel) -> None:
    def without_threes(logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        after_a_one = torch.tensor([prefixes(row)[-1] == 1 for row in range(len(logits))])
        logits = logits.clone()
        logits[after_a_one, 3] = -torch.inf
        return logits

    without_threes.exits = ()  # type: ignore[attr-defined]
    method = MetricAware(metric="squared_error", labels=("1", "3", "13", "31"), lead="")
    decoder = Decoder(letters, [method], before=[without_threes])  # type: ignore[list-item]
    own = method.decide(decoder, ["7="]).outcomes[0]
    assert own.probability(13.0) == 0
    assert own.probability(31.0) > 0


def test_scores_are_those_of_the_cache_in_use(mini: PreTrainedModel) -> None:
    method = MetricAware(labels=("good", "bad"))
    prompt = ["The road was long. " * 30 + REVIEWS[2]]
    plain = method.decide(mini, prompt).outcomes[0].probability("bad")
    decoder = Decoder(mini, [method], new_cache=Kivi(bits=2, group_size=32, window=32).new)
    kept = method.decide(decoder, prompt).outcomes[0].probability("bad")
    assert 0 < abs(plain - kept) < 0.5


def test_the_terminator_tells_1_from_10(letters: PreTrainedModel) -> None:
    """Without it the first digit of 10 counts for 1 too; that is another answer, and is refused."""
    prompt = encoded(letters, "42=")
    ended = MetricAware(metric="squared_error", labels=("1", "10"), lead="").decide(letters, [prompt])
    own = ended.outcomes[0]
    one, ten = (math.exp(one_by_one(letters, prompt, label_tokens(letters, t))) for t in ("1\n", "10\n"))
    assert own.probability(1.0) == pytest.approx(one / (one + ten), abs=1e-5)
    cut, longer = (math.exp(one_by_one(letters, prompt, label_tokens(letters, t))) for t in ("1", "10"))
    assert abs(cut / (cut + longer) - own.probability(1.0)) > 0.01
    with pytest.raises(ConfigError, match="the label '1' is the beginning of '10'.* give an `end`"):
        MetricAware(metric="squared_error", labels=("1", "10"), end="")
    MetricAware(metric="squared_error", labels=("1", "20"), end="").decide(letters, [prompt])


def test_a_trie_holds_what_has_to_be_read_and_nothing_else() -> None:
    trie = LabelTrie.of([[5, 6, 9], [5, 7, 9], [5, 6, 8]], ["a", "b", "c"])
    assert trie.tree.tokens == [5, 6, 7]
    assert trie.tree.parents == [-1, 0, 0]
    assert trie.tree.ranks == [0, 0, 1]
    assert trie.steps == (((-1, 5), (0, 6), (1, 9)), ((-1, 5), (0, 7), (2, 9)), ((-1, 5), (0, 6), (1, 8)))
    assert trie.tree.law == "deterministic"
    assert LabelTrie.of([[5], [6]], ["a", "b"]).tree.tokens == []


def test_a_rule_for_draws_is_not_for_a_trie() -> None:
    class Named(Proposer):
        law = LabelTrie.of([[1]], ["a"]).tree.law

    with pytest.raises(CompositionError, match="by the law deterministic"):
        TokenRule().check(Named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[], [1]], "the answer 'a' holds no token"),
        ([[1], [1]], "are the same tokens"),
        ([[1], [1, 2]], "the answer 'a' is the beginning of 'b'; give an `end`"),
        ([[1, 2], [1]], "the answer 'b' is the beginning of 'a'"),
    ],
)
def test_sequences_that_no_trie_can_tell_apart_are_refused(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelTrie.of(sequences, ["a", "b"])


def test_texts_are_encoded_as_they_follow_their_prompt(mini: PreTrainedModel) -> None:
    for prompt, text in (("Label:", " good\n"), ("23+45=", "68\n"), ("Answer:", " The Hague\n")):
        joint = label_tokens(mini, prompt + text)
        assert (
            Continuations(tokenizer_of(mini), [text]).after(encoded(mini, prompt))[0]
            == (joint[len(label_tokens(mini, prompt)) :])
        )


def digits_or_none(text: str) -> float | None:
    return float(text) if text in map(str, range(100)) else None


@pytest.mark.parametrize("draws", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_scoring_is_the_limit_of_sampling(letters: PreTrainedModel, draws: int) -> None:
    """All of one and two digits as labels, against so many draws of which those are kept."""
    labels = tuple(map(str, range(100)))
    scored = MetricAware(metric="squared_error", labels=labels, lead="").decide(letters, ["7="])
    drawn = MetricAware(metric="squared_error", samples=draws, lead="").decide(
        letters, ["7="], sampling=Sampling(max_new_tokens=3), parse=digits_or_none
    )
    own, other = scored.outcomes[0], drawn.outcomes[0]
    kept = draws - other.dropped
    assert kept > draws / 4
    assert other.mass == pytest.approx(kept / draws)
    assert abs(other.mass - own.mass) < 3 * math.sqrt(own.mass * (1 - own.mass) / draws)
    values = own.numbers("squared_error")
    spread = math.sqrt(float(own.weights @ (values - scored.values[0]) ** 2) / kept)  # type: ignore[operator]
    assert abs(float(drawn.values[0]) - float(scored.values[0])) < 3 * spread
    likely = [(value, weight) for value, weight in zip(own.values, own.weights, strict=True) if weight * kept > 5]
    assert len(likely) > 10
    for value, weight in likely:
        assert abs(other.probability(value) - weight) < 5 * math.sqrt(weight * (1 - weight) / kept)
    # this is a test of probabilities: those at another temperature are not within so little
    warped = np.array(own.weights) ** 0.7
    assert abs(float(warped @ values / warped.sum()) - float(scored.values[0])) > 3 * spread


def below_fifty(model: PreTrainedModel) -> float:
    """P(answer is below 50), by scoring all answers."""
    labels = tuple(map(str, range(100)))
    own = MetricAware(metric="squared_error", labels=labels, lead="").decide(model, ["7="]).outcomes[0]
    return float(own.weights[own.numbers("") < 50].sum())


def drawn_mean(model: PreTrainedModel, **options: object) -> tuple[float, float]:
    """The same estimated from draws, its mean and standard error over repetitions."""
    method = MetricAware(metric="gain", samples=30, lead="", **options)  # type: ignore[arg-type]
    found = method.decide(
        model, ["7="] * 40, sampling=Sampling(max_new_tokens=3), parse=digits_or_none, gain=lambda y, v: 0.0
    )
    below = [float(own.weights[own.numbers("gain") < 50].sum()) for own in found.outcomes]
    return float(np.mean(below)), float(np.std(below) / math.sqrt(len(below)))


def test_warped_draws_are_weighted_back(letters: PreTrainedModel) -> None:
    mean, error = drawn_mean(letters, temperature=0.5, weights="importance")
    assert abs(mean - below_fifty(letters)) < 4 * error + 0.02, (
        "self-normalised weights are biased by one over the draws"
    )


def test_draws_at_another_temperature_do_not_count_alike(letters: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"temperature 0.5 .* set weights=importance"):
        MetricAware(metric="squared_error", temperature=0.5)
    with pytest.raises(ConfigError, match="top_p 0.9"):
        MetricAware(metric="squared_error", top_p=0.9)
    # and they are right to be refused: counted alike, they are far off
    decoder = Decoder(letters)
    warped = Sampling(temperature=0.5, max_new_tokens=3)
    prompts = [encoded(letters, "7=")] * 40
    below = [
        float(own.weights[own.numbers("") < 50].sum())
        for own in estimates.sampled(
            decoder,
            prompts,
            warped,
            30,
            end="\n",
            parse=digits_or_none,
            weighting="counts",
            with_greedy=False,
            spent=[],
        )
    ]
    assert abs(float(np.mean(below)) - below_fifty(letters)) > 4 * float(np.std(below)) / math.sqrt(40) + 0.02


def test_different_draws_weighted_by_their_probability_are_the_scores_of_those_drawn(letters: PreTrainedModel) -> None:
    drawn = MetricAware(metric="squared_error", samples=100, weights="probability", lead="").decide(
        letters, ["7="], sampling=Sampling(max_new_tokens=3), parse=digits_or_none
    )
    own = drawn.outcomes[0]
    scored = MetricAware(metric="squared_error", labels=own.texts, lead="").decide(letters, ["7="])
    assert own.values == scored.outcomes[0].values
    assert len(own.values) > 3
    np.testing.assert_allclose(own.weights, scored.outcomes[0].weights, atol=1e-5)


def test_what_is_no_answer_is_dropped_and_counted_and_not_taken_for_zero(letters: PreTrainedModel) -> None:
    found = MetricAware(metric="squared_error", samples=200, lead="").decide(
        letters, ["7="], sampling=Sampling(max_new_tokens=3), parse=digits_or_none
    )
    own = found.outcomes[0]
    assert 0 < own.dropped < 200
    assert own.mass == pytest.approx(1 - own.dropped / 200)
    assert own.weights.sum() == pytest.approx(1)
    assert found.ledger.prompts == 1, "draws share the reading of their prompt"
    assert found.ledger.prompt_tokens == len(encoded(letters, "7=")) - 1
    with pytest.raises(DataError, match="none of 3 texts is an answer"):
        MetricAware(metric="squared_error", samples=3, lead="").decide(letters, ["7="], parse=lambda text: None)


def test_texts_without_an_end_are_no_answers(letters: PreTrainedModel) -> None:
    short = Sampling(max_new_tokens=1)
    with pytest.raises(DataError, match="is an answer"):
        MetricAware(metric="squared_error", samples=4, end="no end", lead="").decide(letters, ["7="], sampling=short)
    any_length = MetricAware(metric="exact_match", samples=4, end="", lead="").decide(letters, ["7="], sampling=short)
    assert any_length.texts[0].strip() in LETTERS


def test_draws_do_not_depend_on_how_many_are_made_at_once(
    letters: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["7=", "12=", "3=", "44="]

    def weights() -> list[tuple[object, ...]]:
        found = MetricAware(samples=5, lead="").decide(letters, prompts, sampling=Sampling(max_new_tokens=4), parse=str)
        return [(own.values, own.weights.tolist()) for own in found.outcomes]

    together = weights()
    for rows in (12, 5, 3):
        monkeypatch.setattr(estimates, "_ROWS", rows)
        assert weights() == together
    assert len({values for values, _ in together}) > 1


def test_a_pool_is_decided_as_its_prompts_are(mini: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.decoding._decisions import labels

    method = MetricAware(metric="squared_error", labels=NUMBERS, lead="")
    together = method.decide(mini, SUMS)
    alone = [method.decide(mini, [prompt]).values[0] for prompt in SUMS]
    np.testing.assert_allclose(np.array(together.values, float), np.array(alone, float), atol=1e-3)
    monkeypatch.setattr(labels, "_LOGITS_PER_FORWARD", 1)
    by_row = method.decide(mini, SUMS)
    assert by_row.ledger.target_forwards == len(SUMS)
    assert by_row.ledger.nodes_scored == together.ledger.nodes_scored
    np.testing.assert_allclose(np.array(by_row.values, float), np.array(alone, float), atol=1e-3)


def test_another_metric_is_another_answer(mini: PreTrainedModel) -> None:
    labels = tuple(map(str, range(200)))
    mode, mean, median = (
        MetricAware(metric=metric, labels=labels, lead="").decide(mini, ["88+94="])
        for metric in ("exact_match", "squared_error", "absolute_error")
    )
    own = mode.outcomes[0]
    assert mode.values[0] == own.values[int(own.weights.argmax())]
    assert mean.values[0] == pytest.approx(float(own.weights @ own.numbers("")))
    assert mode.values[0] != mean.values[0]
    assert own.weights[own.numbers("") <= median.values[0]].sum() >= 0.5  # type: ignore[operator]
    assert mean.texts[0] == f"{mean.values[0]:.6g}"
    raw = MetricAware(metric="squared_error", labels=labels, lead="", renormalise=False).decide(mini, ["88+94="])
    assert raw.values[0] == pytest.approx(float(mean.values[0]) * own.mass)


REVIEWS = (
    "Review: The inn was good and the bed was fine.\nLabel:",
    "Review: The inn was bad and the bed was poor.\nLabel:",
    "Review: The inn was not good.\nLabel:",
)


def test_a_set_is_decided_with_a_threshold_of_its_own_or_of_another(mini: PreTrainedModel) -> None:
    method = MetricAware(metric="f_beta", labels=("good", "bad"), positive="bad")
    found = method.decide(mini, REVIEWS)
    p = [own.probability("bad") for own in found.outcomes]
    assert found.threshold is not None
    assert found.values == [float(x > found.threshold) for x in p]
    assert found.texts == ["bad" if x > found.threshold else "good" for x in p]
    fixed = MetricAware(metric="f_beta", labels=("good", "bad"), positive="bad", threshold=1.0).decide(mini, REVIEWS)
    assert fixed.texts == ["good"] * 3
    ranks = MetricAware(metric="auc", labels=("good", "bad"), positive="bad").decide(mini, REVIEWS)
    assert ranks.values == pytest.approx(p)


def test_token_f1_and_any_other_gain_look_at_the_greedy_answer_too(mini: PreTrainedModel) -> None:
    prompts = ["The old house by the river"]
    short = Sampling(max_new_tokens=6)
    found = MetricAware(metric="token_f1", samples=4, end="").decide(mini, prompts, sampling=short)
    decoder = Decoder(mini)
    greedy = decoder.decode(decoder.generate([encoded(mini, prompts[0])], short).tokens[0])
    own = found.outcomes[0]
    assert " ".join(greedy.split()) in own.values
    assert own.mass == 1
    assert own.weights.sum() == pytest.approx(1)
    asked = MetricAware(metric="gain", samples=4, end="").decide(
        mini, prompts, sampling=short, gain=lambda answer, decision: float(decision == value_in(greedy))
    )
    assert asked.texts[0] == " ".join(greedy.split()) or asked.texts[0] == greedy.strip()


def test_the_front_doors_write_the_decision(mini: PreTrainedModel) -> None:
    method = MetricAware(metric="squared_error", labels=tuple(map(str, range(200))), lead="")
    text = method.decide(mini, ["88+94="]).texts[0]
    decoder, shown = Decoder(mini, [method]), []
    done = decoder.generate(
        [encoded(mini, "88+94=")],
        Sampling(max_new_tokens=20),
        on_tokens=lambda row, tokens: shown.append((row, tokens)),
    )
    assert decoder.decode(done.tokens[0]) == text
    assert done.finishes == ["decision"]
    assert done.ledger.committed == len(done.tokens[0])
    assert shown == [(0, done.tokens[0])]
    cut = decoder.generate([encoded(mini, "88+94=")], Sampling(max_new_tokens=2))
    assert cut.tokens == [done.tokens[0][:2]]
    assert cut.finishes == ["length"]

    ids = torch.tensor([encoded(mini, REVIEWS[1])])
    labelled = MetricAware(labels=("good", "bad"))
    generate: Any = mini.generate
    written = generate(ids, custom_generate=labelled, max_new_tokens=5, do_sample=False)
    assert tokenizer_of(mini).decode(written[0, ids.shape[1] :]) == " bad"


def test_a_metric_of_a_set_wants_the_set(mini: PreTrainedModel) -> None:
    method = MetricAware(metric="f_beta", labels=("good", "bad"), positive="bad")
    prompts = [encoded(mini, text) for text in REVIEWS]
    with pytest.raises(ConfigError, match=r"f_beta is a metric of a set.*MetricAware.decide"):
        Decoder(mini, [method]).generate(prompts[:1], Sampling())
    assert len(Decoder(mini, [method]).generate(prompts, Sampling()).tokens) == 3


def test_requests_that_do_not_fit_are_refused(mini: PreTrainedModel) -> None:
    labelled = MetricAware(labels=("good", "bad"))
    with pytest.raises(DataError, match="no prompt to decide for"):
        labelled.decide(mini, [])
    with pytest.raises(DataError, match="prompt 0 holds no token"):
        labelled.decide(mini, [[]])
    with pytest.raises(DataError, match="exceed the model's"):
        labelled.decide(mini, [[5] * int(mini.config.max_position_embeddings)])
    with pytest.raises(ConfigError, match="needs the function `gain`"):
        MetricAware(metric="gain").decide(mini, ["a"])
    with pytest.raises(ConfigError, match="needs the function `gain`"):
        labelled.decide(mini, ["a"], gain=lambda y, v: 0.0)


def test_options_are_read_from_text() -> None:
    method = MetricAware.from_options({"metric": "kappa", "labels": "1,2,3", "lead": "", "level": "0.25"})
    assert method.labels == ("1", "2", "3")
    assert method.level == 0.25
