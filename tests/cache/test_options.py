"""Options of every cache method: round trips, and refusals that name the option, its value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.core.errors import ConfigError
from trimtab.core.registry import method_class

from .cases import CASES, FIRST, Case
from .conftest import build, new_cache, tiny

each = pytest.mark.parametrize("case", CASES, ids=str)
first_of_each = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)


@each
def test_options_round_trip(case: Case) -> None:
    method = build(case.name, case.options)
    options = method.to_dict()
    assert case.options.items() <= options.items()
    assert method_class(case.name).from_options(options) == method
    texts = {name: str(value) for name, value in case.options.items() if not isinstance(value, bool)}
    rest = {name: value for name, value in case.options.items() if isinstance(value, bool)}
    assert method_class(case.name).from_options({**texts, **rest}) == method
    assert new_cache(tiny(), case.name, case.options).plan.options == options


@first_of_each
def test_unknown_options_are_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=f"{type(build(case.name, {})).__name__} has no option 'colour'"):
        method_class(case.name).from_options({"colour": 4})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kivi", {"bits": 5}, "bits=5 cannot be used.*1, 2, 3, 4 or 8"),
        ("kivi", {"value_bits": 16}, "value_bits=16"),
        ("kivi", {"group_size": 24}, "group_size=24 is not a multiple of 16"),
        ("kivi", {"window": 48}, "window=48 is not a multiple of group_size=32"),
        ("kivi", {"window": 0}, "window=0"),
        ("gear", {"bits": 1}, "bits=1 cannot be used.*2, 3, 4 or 8"),
        ("gear", {"outliers_keys": 0.6}, r"outliers_keys=0.6 must be in \[0, 0.5\)"),
        ("gear", {"buffer": 96}, "buffer=96 must be .* a multiple of group_size=64"),
        ("gear_l", {"rank_keys": -1}, r"ranks \(-1, 2, 4, 4\) must be >= 0"),
        ("gear_l", {"iterations": 0}, "iterations=0 >= 1"),
        ("gear_l", {"backbone": "gptq"}, "backbone='gptq' cannot be used.*'kivi' or 'kcvt'"),
        ("kvquant", {"bits": 8}, "bits=8 cannot be used.*1, 2, 3 or 4"),
        ("kvquant", {"outliers": -0.1}, r"outliers=-0.1 must be in \[0, 0.5\)"),
        ("kvquant", {"sinks": -1}, "sinks=-1 must be >= 0"),
        ("cq", {"bits": 7}, "bits=7 with channels=4; codes can have"),
        ("cq", {"channels": 1, "bits": 8}, r"bits=8 with channels=1; codes can have \(1, 2, 4\) bits"),
        ("cq", {"channels": 0}, "channels=0 must be >= 1"),
        ("rotatekv", {"bits": 1}, "bits=1 cannot be used.*2, 3, 4 or 8"),
        ("rotatekv", {"clip": 1.5}, r"clip=1.5 must be in \(0, 1\]"),
        ("rotatekv", {"heads_per_rotation": 0}, "heads_per_rotation=0 must be >= 1"),
        ("streaming", {"window": 0}, "window=0 must be >= 0 and >= 1"),
        ("streaming", {"sinks": -4}, "sinks=-4"),
        ("retrieval_heads", {"full_fraction": 1.5}, r"full_fraction=1.5 must be in \[0, 1\]"),
        ("retrieval_heads", {"bits": 5}, "bits=5 cannot be used"),
        ("auto", {"bits_per_element": 0.0}, r"bits_per_element=0.0 must be in \(0, 16\]"),
        ("auto", {"context": 20}, "leave nothing to encode of context=20"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, options)


@pytest.mark.parametrize(
    ("name", "options", "head_dim", "message"),
    [
        ("kivi", {}, 24, "kivi: group_size=32 does not divide the head dimension 24"),
        ("gear", {}, 32, "gear: group_size=64 does not divide the head dimension 32"),
        ("gear_l", {"group_size": 16, "buffer": 32, "prefill_rank_keys": 40}, 32, "rank exceeds the head dimension 32"),
        ("cq", {"channels": 5, "bits": 4}, 32, "cq: channels=5 does not divide the head dimension 32"),
        ("rotatekv", {}, 24, "rotatekv: the head dimension 24 is not a power of two"),
        ("rotatekv", {"group_size": 48}, 32, "groups of 48 channels do not divide 2 KV heads of size 32"),
        ("retrieval_heads", {"bits": 4}, 24, "kivi: group_size=32 does not divide the head dimension 24"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(
    name: str, options: dict[str, Any], head_dim: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        new_cache(tiny(head_dim=head_dim), name, options)
