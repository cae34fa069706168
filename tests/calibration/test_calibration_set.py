"""Calibration text: how it is cut, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.core.errors import DataError
from trimtab.models.calibration_set import CalibrationSet

WORDS = [f"w{i}" for i in range(500)]


def word_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, `w7` -> 7; with `begin`, sequences start with <s> = 500."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 500)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TEXT = " ".join(WORDS)


def test_windows_are_runs_of_the_text_and_do_not_overlap() -> None:
    found = CalibrationSet.from_text(TEXT, word_tokenizer(), sequences=5, length=20)
    assert found.tokens.shape == (5, 20)
    assert bool((found.tokens.diff(dim=1) == 1).all())
    assert len(found.tokens.unique()) == 100
    assert bool((found.tokens[:, 0].diff() > 0).all())
    assert found.mask.all()
    assert found.count == 100


def test_seed_chooses_the_windows() -> None:
    first, again, other = (
        CalibrationSet.from_text(TEXT, word_tokenizer(), sequences=5, length=20, seed=seed) for seed in (0, 0, 1)
    )
    assert first.sha256 == again.sha256
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 != other.sha256


def test_a_short_text_gives_the_windows_it_has() -> None:
    assert len(CalibrationSet.from_text(TEXT, word_tokenizer(), sequences=128, length=100).tokens) == 5


def test_length_is_bounded_by_the_context() -> None:
    assert CalibrationSet.from_text(TEXT, word_tokenizer(), context=50).length == 50
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 40
    assert CalibrationSet.from_text(TEXT, tokenizer, context=50).length == 40


def test_begin_token_stands_before_every_window() -> None:
    found = CalibrationSet.from_text(TEXT, word_tokenizer(begin=True), sequences=4, length=20)
    assert found.tokens.shape == (4, 20)
    assert bool((found.tokens[:, 0] == 500).all())
    assert bool((found.tokens[:, 1:].diff(dim=1) == 1).all())


def test_a_string_that_names_a_file_is_read_as_one(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT, encoding="utf-8")
    direct = CalibrationSet.from_text(TEXT, word_tokenizer(), length=20)
    for name in (file, str(file)):
        found = CalibrationSet.from_text(name, word_tokenizer(), length=20)
        assert found.sha256 == direct.sha256
        assert found.source == str(file)


def test_only_a_span_of_a_large_text_is_read() -> None:
    large = " ".join(WORDS * 200)
    found = CalibrationSet.from_text(large, word_tokenizer(), sequences=2, length=10)
    assert found.tokens.shape == (2, 10)


def test_the_shipped_text_is_the_default() -> None:
    found = CalibrationSet.from_text(None, word_tokenizer(), sequences=2, length=10)
    assert found.source == "prose_calibration.txt"


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_text_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        CalibrationSet.from_text(text, word_tokenizer())
    file = tmp_path / "empty.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        CalibrationSet.from_text(file, word_tokenizer())


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9"):
        CalibrationSet.from_text(file, word_tokenizer())


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        CalibrationSet.from_text(tmp_path / "none.txt", word_tokenizer())


def test_fewer_tokens_than_one_sequence_are_refused() -> None:
    with pytest.raises(DataError, match=r"has 500 tokens, fewer than one sequence of 501"):
        CalibrationSet.from_text(TEXT, word_tokenizer(), length=501)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), None, "must be integers"),
        (torch.zeros(2, 4), None, "must be integers"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 3), "does not fit"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), "no token that is not padding"),
        (torch.zeros(0, 4, dtype=torch.int64), None, "no token that is not padding"),
    ],
)
def test_unusable_tokens_are_refused(tokens: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CalibrationSet.from_tokens(tokens, mask)


def test_the_hash_covers_tokens_mask_and_shape() -> None:
    tokens = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4)
    masked = mask.clone()
    masked[2, 3] = 0
    made = [
        CalibrationSet.from_tokens(tokens, mask),
        CalibrationSet.from_tokens(tokens, masked),
        CalibrationSet.from_tokens(tokens + 1, mask),
        CalibrationSet.from_tokens(tokens.view(4, 3)),
    ]
    assert len({found.sha256 for found in made}) == 4
