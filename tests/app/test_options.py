"""How the text of options becomes values, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trimtab.app.cli.options import read_settings, read_texts, split_names, split_numbers, typed_settings
from trimtab.core.errors import ConfigError, DataError


def test_settings() -> None:
    assert read_settings(["bits=4", "group-size = 64", "note=a=b"]) == {"bits": "4", "group_size": "64", "note": "a=b"}
    assert read_settings(None) == {}


@pytest.mark.parametrize("pairs", [["bits"], ["=4"], ["bits=4", "bits=3"]])
def test_unclear_settings_are_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="bits|=4"):
        read_settings(pairs)


def test_lists_and_none_are_read_by_the_type_of_the_option() -> None:
    @dataclasses.dataclass
    class Options:
        targets: "tuple[str, ...]" = ("*",)
        rank: "int | None" = 4
        bits: int = 4

    settings = {"targets": "q, k", "rank": "none", "bits": "3", "other": "x"}
    assert typed_settings(Options, settings) == {"targets": ("q", "k"), "rank": None, "bits": "3", "other": "x"}


def test_names_and_numbers() -> None:
    assert split_names(" rtn, gptq", "--methods") == ["rtn", "gptq"]
    assert split_numbers("2,3", "--bits") == [2, 3]
    for text in ("", " , ", "rtn,rtn"):
        with pytest.raises(ConfigError, match="--methods"):
            split_names(text, "--methods")
    with pytest.raises(ConfigError, match="'x'"):
        split_numbers("2,x", "--bits")


@pytest.mark.parametrize(("content", "reason"), [(b"", "no text"), (b" \n", "no text"), (b"caf\xe9 au lait", "UTF-8")])
def test_text_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        read_texts([file])
    assert str(file) in str(error.value)


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_texts([tmp_path / "nowhere.txt"])
