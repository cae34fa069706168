"""Options: types, unknown names, loosely typed values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from trimtab.core.config import Config
from trimtab.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    bits: Literal[2, 3, 4, 8]
    damping: float = 0.01
    act_order: bool = False
    targets: tuple[str, ...] = ("*",)

    def check(self) -> None:
        if not 0 <= self.damping < 1:
            raise ConfigError(f"damping={self.damping} is outside [0, 1).")


def test_strings_are_read_as_the_type_of_the_field() -> None:
    options = {"bits": 4, "damping": "0.1", "act_order": "true", "targets": ["q_proj", "o"]}
    example = Example.from_options(options)
    assert example == Example(bits=4, damping=0.1, act_order=True, targets=("q_proj", "o"))


def test_literal_numbers_are_read_from_strings() -> None:
    assert Example.from_options({"bits": "4"}).bits == 4


def test_a_single_string_is_a_tuple_of_one() -> None:
    assert Example.from_options({"bits": 4, "targets": "q_proj,o"}).targets == ("q_proj", "o")


def test_dictionary_round_trip() -> None:
    example = Example(bits=3, targets=("q",))
    assert Example.from_options(example.to_dict()) == example


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bit": 4}, ["'bit'", "Did you mean 'bits'"]),
        ({}, ["needs the option 'bits'"]),
        ({"bits": 5}, ["bits=5"]),
        ({"bits": 4, "damping": "much"}, ["damping='much'"]),
        ({"bits": 4, "damping": 1.5}, ["1.5", "[0, 1)"]),
        ({"bits": 4, "act_order": "perhaps"}, ["act_order='perhaps'"]),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Example.from_options(options)
    for word in words:
        assert word in str(caught.value)


def test_the_constructor_checks_types_too() -> None:
    with pytest.raises(ConfigError, match="damping='0.1'"):
        Example(bits=4, damping="0.1")  # type: ignore[arg-type]


def test_an_integer_serves_as_a_float() -> None:
    assert Example(bits=4, damping=0).damping == 0
