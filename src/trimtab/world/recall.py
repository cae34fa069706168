"""In-context recall: a list of key-value records, then the value of one key is asked.

Nothing but the prompt holds the answer, so this measures retrieval from context (attention heads,
KV caches). Prose put between the records and the question stretches the distance.

Held out: (key, value) pairs. A pair of the evaluation split never occurs in a training document;
for values of two words the pair is (key, first word), for number codes it is (key, code).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from trimtab.world.lexicon import KEYS, VALUES
from trimtab.world.split import belongs, generator
from trimtab.world.types import Document, Example, Span, Split


class Form(NamedTuple):
    """How records and questions are written; ``{k}`` is the key, the value follows ``record``."""

    opening: str
    record: str
    between: str
    closing: str
    asking: str


FORMS: dict[str, Form] = {
    "adjacent": Form("Notes:", " {k}", ",", ".\n", "Answers:"),
    "list": Form("Notes:", " {k} =", ",", ".\n", "Answers:"),
    "sentence": Form("Notes:", " The {k} is", ".", ".\n", "Answers:"),
}
"""From the easiest to the hardest to look up: the value directly after its key, one sign between,
and a sentence."""

VALUE_KINDS = ("word", "pair", "code")


def _value(rng: random.Random, split: Split, key: str, kind: str, taken: set[str]) -> str:
    """A value of this kind that this split may give to the key and that is not taken yet."""
    while True:
        if kind == "code":
            value = f"{rng.randrange(1000):03d}"
            identity = value
        else:
            identity = rng.choice(VALUES)
            value = identity if kind == "word" else f"{identity} {rng.choice(VALUES)}"
        if value not in taken and belongs(split, "recall", key, identity):
            taken.add(value)
            return value


def draw_records(rng: random.Random, split: Split, count: int, kind: str) -> list[tuple[str, str]]:
    """``count`` records with different keys and different values."""
    taken: set[str] = set()
    return [(key, _value(rng, split, key, kind, taken)) for key in rng.sample(KEYS, count)]


def _check(records: int, form: str, value: str) -> None:
    if not 1 <= records <= len(KEYS):
        raise ValueError(f"recall: records must be in [1, {len(KEYS)}], not {records}")
    if form not in FORMS:
        raise ValueError(f"recall: unknown form {form!r}; there are: {', '.join(FORMS)}")
    if value not in VALUE_KINDS:
        raise ValueError(f"recall: unknown value {value!r}; there are: {', '.join(VALUE_KINDS)}")


def _context(form: Form, records: list[tuple[str, str]], filler: str) -> str:
    listing = form.between.join(form.record.format(k=k) + f" {v}" for k, v in records)
    prose = f"{filler}\n" if filler else ""
    return f"{form.opening}{listing}{form.closing}{prose}"


def examples(
    split: Split,
    n: int,
    seed: int,
    *,
    records: int = 16,
    filler: str = "",
    form: str = "list",
    value: str = "word",
) -> list[Example]:
    """Questions about one of ``records`` records.

    filler  prose between the records and the question; four characters are about one token.
    form    one of ``FORMS``.
    value   "word" (one token), "pair" (two words) or "code" (three digits).
    """
    _check(records, form, value)
    rng = generator("recall", split, seed)
    layout = FORMS[form]
    made = []
    for _ in range(n):
        known = draw_records(rng, split, records, value)
        asked = rng.randrange(records)
        key, answer = known[asked]
        context = _context(layout, known, filler.strip())
        made.append(
            Example(
                prompt=context + layout.asking + layout.record.format(k=key),
                answer=f" {answer}",
                choices=tuple(f" {v}" for _, v in known),
                fields={
                    "records": records,
                    "filler_chars": len(filler.strip()),
                    "form": form,
                    "value": value,
                    "position": asked,
                },
            )
        )
    return made


def document(
    rng: random.Random,
    split: Split,
    *,
    records: int = 16,
    filler: str = "",
    form: str = "list",
    value: str = "word",
    questions: int | None = None,
) -> Document:
    """Records, filler, then many questions with their answers, in random order."""
    layout = FORMS[form]
    known = draw_records(rng, split, records, value)
    spans = [Span(layout.opening, "noise")]
    for i, (key, answer) in enumerate(known):
        spans.append(Span((layout.between if i else "") + layout.record.format(k=key), "noise"))
        spans.append(Span(f" {answer}", "noise"))
    spans.append(Span(layout.closing, "noise"))
    if filler:
        spans.append(Span(f"{filler.strip()}\n", "plain"))
    spans.append(Span(layout.asking, "noise"))
    asked = rng.sample(known, min(questions or records, records))
    for i, (key, answer) in enumerate(asked):
        spans.append(Span((layout.between if i else "") + layout.record.format(k=key), "noise"))
        spans.append(Span(f" {answer}", "answer"))
    spans.append(Span(".\n", "noise"))
    return tuple(spans)


def training_document(rng: random.Random, split: Split, filler: Callable[[int], str] | None = None) -> Document:
    """A document of the full mixture: 4 to 48 records, mostly in list form, sometimes with prose."""
    records = rng.choice((4, 6, 8, 8, 12, 12, 16, 16, 16, 20, 24, 32, 48))
    prose = filler(rng.randrange(80, 900)) if filler and rng.random() < 0.3 else ""
    return document(
        rng,
        split,
        records=records,
        filler=prose,
        form=rng.choice(("list", "list", "list", "sentence", "adjacent")),
        value=rng.choice(("word", "word", "word", "pair", "code")),
    )
