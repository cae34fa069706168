"""One line per method and set of options: drafting in CASES, what changes what is decoded in STEERING, decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab.core.registry import method_class
from trimtab.decoding.base import DecodingMethod


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method with options. `bad`: options that it refuses, each with a part of the message."""

    name: str
    options: dict[str, Any]
    bad: tuple[tuple[dict[str, Any], str], ...] = field(default=())

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])

    def method(self, **more: Any) -> DecodingMethod:
        found = method_class(self.name)(**{**self.options, **more})
        assert isinstance(found, DecodingMethod)
        return found


CASES = [
    Case(
        name="speculative",
        options={"depth": 3},
        bad=(
            ({"depth": 0}, "depth=0"),
            ({"draft_temperature": -0.5}, "draft_temperature=-0.5"),
            ({"stop_below": 1.5}, "stop_below=1.5 is no probability"),
            ({"rule": "typcal"}, "rule='typcal'"),
            ({"draft": "ngram", "rule": "block"}, "names tokens and draws none"),
            ({"draft": "ngram", "stop_below": 0.4}, "stop_below do not apply"),
            ({"draft": "ngram", "ngram": 0}, "ngram=0"),
        ),
    ),
    Case(name="speculative", options={"depth": 4, "rule": "block"}),
    Case(name="speculative", options={"depth": 4, "stop_below": 0.3}),
    Case(name="speculative", options={"depth": 3, "draft": "ngram"}),
    Case(
        name="spectr",
        options={"k": 3, "depth": 3},
        bad=(
            ({"k": 0}, "k=0; it must be at least 1"),
            ({"depth": -1}, "depth=-1"),
            ({"draft_temperature": 0.0}, "at 0 all sequences are the same"),
        ),
    ),
    Case(
        name="rsd_c",
        options={"branching": (3, 2, 1)},
        bad=(
            ({"branching": ()}, r"branching=\(\); it must be at least 1"),
            ({"branching": (2, 0)}, r"branching=\(2, 0\)"),
            ({"draft_temperature": 0.0}, "draft_temperature=0.0"),
        ),
    ),
    Case(
        name="rsd_s",
        options={"width": 3, "depth": 3},
        bad=(
            ({"width": 0}, "width=0; it must be at least 1"),
            ({"depth": 0}, "depth=0"),
            ({"draft_temperature": -1.0}, "draft_temperature=-1.0"),
        ),
    ),
]
FIRST = list({case.name: case for case in reversed(CASES)}.values())
"""One for each method."""
PAIR = {"tuned": "tuned", "untuned": "ref-mini"}
STEERING = [
    Case(
        name="dola",
        options={},
        bad=(
            ({"relative_top": 1.5}, "relative_top is 1.5"),
            ({"relative_top": -0.1}, "relative_top is -0.1"),
            ({"layers": ()}, "layers is empty"),
            ({"layers": "middle"}, "layers='middle'"),
            ({"divergence": "other"}, "divergence='other'"),
        ),
    ),
    Case(
        name="dola", options={"layers": (0, 2), "relative_top": 0.3, "divergence": "official", "norm_premature": True}
    ),
    Case(name="dola", options={"layers": (1,), "relative_top": 0.0}),
    Case(name="eft", options={**PAIR, "beta": 1.5}, bad=(({"beta": "much"}, "beta='much'"),)),
    Case(
        name="weak_to_strong",
        options={**PAIR, "width": 2, "successors": 2, "chunk": 3},
        bad=(
            ({"width": 0}, "width is 0; it must be at least 1"),
            ({"successors": 0}, "successors is 0; it must be at least 1"),
            ({"chunk": -1}, "chunk is -1; it must be at least 0"),
            ({"tuned_template": "none"}, r"tuned_template does not say where the prompt goes; write \{prompt\} there"),
        ),
    ),
    Case(
        name="weak_to_strong",
        options={**PAIR, "width": 1, "chunk": 0, "normalise": True, "untuned_template": "Say: {prompt}"},
    ),
]
DECIDING = Case(
    name="metric_aware",
    options={},
    bad=(
        ({"labels": ("a", "a")}, "'a' is named more than once"),
        ({"labels": (" a",)}, "' a' is empty or has white space around it"),
        ({"labels": ("",)}, "is empty"),
        ({"labels": ("good", "goodness"), "end": ""}, "'good' is the beginning of 'goodness'"),
        ({"labels": ("one", "2"), "metric": "squared_error"}, "squared_error is for numbers, but 'one' is a label"),
        ({"labels": ("a", "b"), "metric": "auc"}, "auc asks how likely '1.0' is, which is no label"),
        ({"labels": ("a", "b"), "metric": "f_beta", "positive": "c"}, "how likely 'c' is"),
        ({"metric": "kappa"}, "kappa decides among labels"),
        ({"metric": "accuracy"}, "metric='accuracy'"),
        ({"samples": 0}, "samples is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"level": 1.0}, "level is 1.0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"renormalise": False}, "renormalise=False is for squared_error with labels"),
    ),
)
