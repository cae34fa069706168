"""Closed-book facts: questions about the invented people that only the weights can answer.

The same people are in both splits, because a fact can only be answered when it was learned. Held
out is the wording: of the question forms of a relation, one per (person, relation) is reserved for
evaluation and never occurs in a training document with that person; the model has met the form with
other people, and the fact in other words.
"""

from __future__ import annotations

import random

from trimtab.world.people import RELATIONS, VALUES, Person, people
from trimtab.world.split import bucket, generator
from trimtab.world.types import Document, Example, Span, Split

STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": ("{p} lives in", "{p} has a house in", "The home of {p} is in"),
    "work": ("{p} works as a", "{p} earns a living as a", "The trade of {p} is that of a"),
    "pet": ("{p} keeps a", "{p} has a pet", "The pet of {p} is a"),
    "instrument": ("{p} plays the", "{p} makes music on the", "The instrument of {p} is the"),
    "color": ("{p} likes the color", "{p} always wears", "The favorite color of {p} is"),
    "dish": ("{p} loves to eat", "{p} dines on", "The favorite dish of {p} is"),
}
"""Sentences whose last word is the value."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": (
        "Where does {p} live?",
        "In which town is the home of {p}?",
        "What is the town of {p}?",
        "Which town does {p} call home?",
    ),
    "work": (
        "What does {p} do for a living?",
        "What is the trade of {p}?",
        "What work does {p} do?",
        "Which trade has {p}?",
    ),
    "pet": (
        "Which pet does {p} keep?",
        "What is the pet of {p}?",
        "Which animal does {p} have?",
        "What animal lives with {p}?",
    ),
    "instrument": (
        "What does {p} play?",
        "Which instrument does {p} play?",
        "What is the instrument of {p}?",
        "On what does {p} make music?",
    ),
    "color": (
        "Which color does {p} like?",
        "What is the favorite color of {p}?",
        "What color does {p} wear?",
        "What is the color of {p}?",
    ),
    "dish": (
        "What does {p} love to eat?",
        "What is the favorite dish of {p}?",
        "Which dish does {p} like?",
        "On what does {p} dine?",
    ),
}
"""Question forms, the same number for each relation."""

QUESTION = "Question: {q}\nAnswer:"
FORMS = 4


def held_out_form(person: Person, relation: str) -> int:
    """Index of the question form that training never uses for this person and relation."""
    return bucket(FORMS, "facts", person.name, relation)


def forms_of(split: Split, person: Person, relation: str) -> tuple[int, ...]:
    """Indices of the question forms that this split may use."""
    reserved = held_out_form(person, relation)
    return tuple(i for i in range(FORMS) if (i == reserved) == (split == "eval"))


def choices_of(relation: str) -> tuple[str, ...]:
    """All admissible answers of a relation, as they follow a prompt."""
    return tuple(f" {value}" for value in VALUES[relation])


def check_relation(task: str, relation: str | None) -> None:
    """Raise ValueError for a relation that the small world does not have."""
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"{task}: unknown relation {relation!r}; there are: {', '.join(RELATIONS)}")


def draw_subjects(rng: random.Random, n: int, relation: str | None) -> list[tuple[Person, str]]:
    """``n`` (person, relation) pairs, all different for as long as there are any left."""
    pairs = [(p, r) for p in people() for r in RELATIONS if relation in (None, r)]
    drawn: list[tuple[Person, str]] = []
    while len(drawn) < n:
        drawn += rng.sample(pairs, min(len(pairs), n - len(drawn)))
    return drawn


def examples(split: Split, n: int, seed: int, *, relation: str | None = None) -> list[Example]:
    """Questions about ``relation``, or about all six relations alike."""
    check_relation("facts", relation)
    rng = generator("facts", split, seed)
    made = []
    for person, about in draw_subjects(rng, n, relation):
        form = rng.choice(forms_of(split, person, about))
        made.append(
            Example(
                prompt=QUESTION.format(q=QUESTIONS[about][form].format(p=person.name)),
                answer=f" {person.facts[about]}",
                choices=choices_of(about),
                cluster=person.name,
                fields={"relation": about, "template": form, "person": person.name},
            )
        )
    return made


def statement(rng: random.Random, person: Person, relation: str, value: str) -> tuple[Span, Span]:
    """One sentence (without its full stop) that says ``value``."""
    opening = rng.choice(STATEMENTS[relation]).format(p=person.name)
    return Span(opening), Span(f" {value}", "answer")


def training_document(rng: random.Random, split: Split) -> Document:
    """Either what is known about one person, or several questions about different people."""
    spans: list[Span] = []
    if rng.random() < 0.4:
        person = rng.choice(people())
        for relation in rng.sample(RELATIONS, len(RELATIONS)):
            spans += [*statement(rng, person, relation, person.facts[relation]), Span(". ")]
        spans[-1] = Span(".\n")
        return tuple(spans)
    for person, relation in draw_subjects_quickly(rng, 4):
        form = rng.choice(forms_of(split, person, relation))
        question = QUESTIONS[relation][form].format(p=person.name)
        spans += [
            Span(QUESTION.format(q=question)),
            Span(f" {person.facts[relation]}", "answer"),
            Span("\n"),
        ]
    return tuple(spans)


def draw_subjects_quickly(rng: random.Random, n: int) -> list[tuple[Person, str]]:
    """``n`` pairs with replacement (a training stream need not avoid repetition)."""
    return [(rng.choice(people()), rng.choice(RELATIONS)) for _ in range(n)]
