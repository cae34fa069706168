"""Trials: the needle is where it was asked to be, and the answer where its span says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from trimtab.cache._retrieval.trials import (
    Needle,
    calibration_prose,
    locate_answer,
    make_trials,
    recall_needles,
    spread_depths,
    spread_lengths,
)
from trimtab.core.errors import ConfigError, DataError
from trimtab.world.split import belongs

HAYSTACK = calibration_prose()[:20000]


@settings(max_examples=25)
@given(length=st.integers(150, 900), depth=st.floats(0, 1), seed=st.integers(0, 1000))
def test_prompts(ref_tokenizer: PreTrainedTokenizerBase, length: int, depth: float, seed: int) -> None:
    (trial,) = make_trials(ref_tokenizer, (length,), depths=(depth,), repeats=1, haystack=HAYSTACK, seed=seed)
    needle = next(recall_needles(seed))
    assert trial.length == length
    a, b = trial.span
    assert ref_tokenizer.decode(trial.prompt[a:b]) == needle.answer == trial.answer
    text = ref_tokenizer.decode(trial.prompt, skip_special_tokens=True)
    passage = needle.before + needle.answer + needle.after
    assert text.count(passage) == 1
    assert text.endswith(needle.question)
    around = text.removesuffix(needle.question)
    at = around.index(passage)
    before = around[:at].rstrip("\"'”’)]»_ ")
    assert not before or before.endswith((".", "!", "?", "\n"))
    # moved back, never forward: counted in tokens of the haystack
    room = length - 1 - len(locate_answer(ref_tokenizer, needle)[0])
    room -= len(ref_tokenizer(needle.question, add_special_tokens=False)["input_ids"])
    moved = len(ref_tokenizer(around[:at], add_special_tokens=False)["input_ids"])
    assert moved <= round(room * depth) + 2  # a piece that begins inside a word may be split otherwise


def test_same_seed_same_trials(ref_tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"depths": (0.3, 0.8), "repeats": 2, "haystack": HAYSTACK}
    first = make_trials(ref_tokenizer, (200, 300), **options)
    assert first == make_trials(ref_tokenizer, (200, 300), **options)
    assert first != make_trials(ref_tokenizer, (200, 300), seed=1, **options)
    assert [(t.length, t.depth) for t in first] == [(200, 0.3), (200, 0.8), (300, 0.3), (300, 0.8)] * 2
    assert len({trial.answer for trial in first}) == len(first)


def test_needles_are_of_the_train_split() -> None:
    for needle in itertools.islice(recall_needles(3), 60):
        key = needle.question.split(":")[1].split()[-2 if needle.question.endswith(("=", "is")) else -1]
        assert belongs("train", "recall", key, needle.answer.split()[0])


def test_the_answer_is_the_one_that_is_asked_for(ref_tokenizer: PreTrainedTokenizerBase) -> None:
    needle = Needle(before="\nThe cat is cold, cold, and the dog is", answer=" cold", after=", cold.", question="?")
    ids, (a, b) = locate_answer(ref_tokenizer, needle)
    assert ref_tokenizer.decode(ids[:b]) == needle.before + needle.answer
    assert b == a + 1


def test_an_answer_that_is_tokenized_otherwise_in_its_place(ref_tokenizer: PreTrainedTokenizerBase) -> None:
    needle = Needle(before="\nThe garden is ", answer="cold", after=" today.", question="?")
    alone = ref_tokenizer("cold", add_special_tokens=False)["input_ids"]
    ids, (a, b) = locate_answer(ref_tokenizer, needle)
    assert ids[a:b] != alone
    assert ref_tokenizer.decode(ids[a:b]).strip() == "cold"


def test_grids() -> None:
    assert spread_lengths(2048, 3) == (256, 1120, 1984)
    assert spread_depths(3) == (0.0, 0.5, 1.0)
    assert spread_depths(1) == (0.0,)
    with pytest.raises(ConfigError, match="context of 64 tokens"):
        spread_lengths(64)


def test_refusals(ref_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="prompt of 20 tokens cannot hold a needle"):
        make_trials(ref_tokenizer, (20,))
    with pytest.raises(DataError, match="the haystack has 3 tokens"):
        make_trials(ref_tokenizer, (500,), haystack="a b c")
    with pytest.raises(ConfigError, match=r"depth 1\.5"):
        make_trials(ref_tokenizer, (500,), depths=(1.5,))
    with pytest.raises(ConfigError, match="need a length"):
        make_trials(ref_tokenizer, ())
    with pytest.raises(ConfigError, match="empty list of needles"):
        make_trials(ref_tokenizer, (500,), needles=[])
    with pytest.raises(DataError, match="needs an answer"):
        make_trials(ref_tokenizer, (500,), needles=[Needle(before="a", answer=" ", after="", question="?")])
