"""How the text of options becomes values, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trimtab.app.cli.options import (
    check_output,
    check_text,
    read_settings,
    split_names,
    split_numbers,
    typed_settings,
)
from trimtab.core.errors import ConfigError, DataError, OutputError


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
        targets: tuple[str, ...] = ("*",)
        rank: int | None = 4
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


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9 au lait", "UTF-8")])
def test_text_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        check_text(file)
    assert str(file) in str(error.value)


def test_missing_text_is_named(tmp_path: Path) -> None:
    check_text(None)
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        check_text(tmp_path / "nowhere.txt")


def test_output_is_refused_unless_it_is_free_or_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, False, holds="config.json")
    out.mkdir()
    check_output(out, False, holds="config.json")
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match="out"):
            check_output(out, force, holds="config.json")
    (out / "config.json").write_text("{}")
    check_output(out, True, holds="config.json")
    with pytest.raises(OutputError, match="not empty"):
        check_output(out, False, holds="config.json")
    with pytest.raises(OutputError, match="file"):
        check_output(out / "thesis.txt", True, holds="config.json")
    with pytest.raises(OutputError, match="not a directory"):
        check_output(out / "thesis.txt" / "deeper", False, holds="config.json")
