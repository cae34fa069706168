"""Open-book questions: a statement in the prompt confirms or contradicts a memorised fact.

The right answer of an example is always what the prompt says. Where it contradicts the memory
(``agrees=False``) the model has to let the context win, which is what context steering works on.
Training documents leave room for that: of the few that contradict, only half believe the context,
the others insist on the fact. (A small model that only ever sees the context win is always right.)

Held out: as for the closed-book facts, one question form per (person, relation).
"""

from __future__ import annotations

import random

from trimtab.world.facts import (
    QUESTION,
    QUESTIONS,
    STATEMENTS,
    check_relation,
    draw_subjects,
    draw_subjects_quickly,
    forms_of,
)
from trimtab.world.people import RELATIONS, VALUES, Person
from trimtab.world.split import generator
from trimtab.world.types import Document, Example, Span, Split

TRAINING_SHARE_AGREEING = 0.7
TRAINING_SHARE_BELIEVED = 0.5
"""Of the training documents whose context contradicts the fact: how many answer with the context."""


def _other_value(rng: random.Random, person: Person, relation: str) -> str:
    memorised = person.facts[relation]
    return rng.choice([value for value in VALUES[relation] if value != memorised])


def _context(rng: random.Random, person: Person, relation: str, value: str, facts: int) -> str:
    """``facts`` sentences about the person, one of which says ``value``; the others are true."""
    about = [relation, *rng.sample([r for r in RELATIONS if r != relation], facts - 1)]
    rng.shuffle(about)
    said = {**person.facts, relation: value}
    sentences = [f"{rng.choice(STATEMENTS[r]).format(p=person.name)} {said[r]}." for r in about]
    return f"Context: {' '.join(sentences)}\n"


def examples(
    split: Split,
    n: int,
    seed: int,
    *,
    agrees: bool | None = None,
    relation: str | None = None,
    facts: int = 1,
) -> list[Example]:
    """Questions whose answer stands in the prompt.

    agrees    True: the context says what was memorised; False: it says something else; None: half
              and half.
    facts     number of sentences in the context, one of which is about the question.
    choices   (value of the context, memorised value); where the two agree, the second is another
              value of the relation, so that there is something to choose between.
    """
    check_relation("openbook", relation)
    if not 1 <= facts <= len(RELATIONS):
        raise ValueError(f"openbook: facts must be in [1, {len(RELATIONS)}], not {facts}")
    if agrees not in (True, False, None):
        raise ValueError(f"openbook: agrees must be True, False or None, not {agrees!r}")
    rng = generator("openbook", split, seed)
    made = []
    for i, (person, about) in enumerate(draw_subjects(rng, n, relation)):
        confirms = i % 2 == 0 if agrees is None else agrees
        memorised, other = person.facts[about], _other_value(rng, person, about)
        said, rival = (memorised, other) if confirms else (other, memorised)
        form = rng.choice(forms_of(split, person, about))
        question = QUESTIONS[about][form].format(p=person.name)
        made.append(
            Example(
                prompt=_context(rng, person, about, said, facts) + QUESTION.format(q=question),
                answer=f" {said}",
                choices=(f" {said}", f" {rival}"),
                cluster=person.name,
                fields={
                    "agrees": confirms,
                    "relation": about,
                    "template": form,
                    "facts": facts,
                    "memorised": memorised,
                    "person": person.name,
                },
            )
        )
    return made


def training_document(rng: random.Random, split: Split) -> Document:
    """One context and one question; the context agrees with the fact in 70 % of the cases."""
    ((person, about),) = draw_subjects_quickly(rng, 1)
    confirms = rng.random() < TRAINING_SHARE_AGREEING
    said = person.facts[about] if confirms else _other_value(rng, person, about)
    answer = said if rng.random() < TRAINING_SHARE_BELIEVED else person.facts[about]
    form = rng.choice(forms_of(split, person, about))
    context = _context(rng, person, about, said, rng.choice((1, 1, 2, 3)))
    question = QUESTION.format(q=QUESTIONS[about][form].format(p=person.name))
    return (
        Span(context, "noise"),
        Span(question),
        Span(f" {answer}", "answer"),
        Span("\n"),
    )
