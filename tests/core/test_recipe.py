"""Recipes: order, round trips, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.core.errors import CompositionError, ConfigError
from trimtab.core.recipe import Recipe
from trimtab.weights import Gptq, Rtn


def test_round_trip_through_json() -> None:
    recipe = Recipe.of(Gptq(bits=3, group_size=32))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.methods() == [Gptq(bits=3, group_size=32)]


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\nsteps:\n  - method: gptq\n    bits: 4\n")
    assert Recipe.from_yaml(path).methods() == [Gptq(bits=4)]


def test_two_quantizers_of_the_same_layers_are_refused() -> None:
    with pytest.raises(CompositionError, match="step 2 .'gptq'.*'rtn'"):
        Recipe.of(Rtn(bits=4), Gptq(bits=4))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "a list 'steps'"),
        ({"steps": [{"bits": 4}]}, "step 1 has no 'method'"),
        ({"steps": [{"method": "gptq", "bits": 4}], "extra": 1}, "unknown entries"),
        ({"version": 99, "steps": []}, "newer"),
        ({"steps": [{"method": "gptq", "bit": 4}]}, "Did you mean 'bits'"),
        ({"steps": [{"method": "nope"}]}, "unknown method 'nope'"),
    ],
)
def test_bad_recipes_name_the_entry(data: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(data)


def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe steps: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "missing.yaml")
