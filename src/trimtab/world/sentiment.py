"""Labelled short reviews: is the writer pleased or not?

Most reviews say two things that point the same way; some turn around after "but" (the second part
decides) and some deny an opinion ("was not good").

Held out: the text of the review. A text of the evaluation split never occurs in training.
"""

from __future__ import annotations

import random

from trimtab.world.split import belongs, generator
from trimtab.world.types import Document, Example, Span, Split

LABELS = ("good", "bad")

TOPICS: dict[str, tuple[str, ...]] = {
    "inn": ("room", "bed", "supper", "wine", "host", "garden", "breakfast", "fire"),
    "book": ("story", "ending", "hero", "plot", "cover", "print", "beginning", "paper"),
    "play": ("music", "dance", "actor", "song", "scene", "voice", "dress", "stage"),
    "journey": ("road", "coach", "train", "boat", "view", "weather", "guide", "company"),
}
"""What is reviewed, and what can be said something about."""

OPINIONS: dict[str, tuple[str, ...]] = {
    "good": (
        "good", "fine", "lovely", "pleasant", "wonderful", "excellent", "beautiful", "splendid",
        "perfect", "charming", "delightful", "nice",
    ),
    "bad": (
        "bad", "poor", "dreadful", "terrible", "awful", "ugly", "wretched", "horrible", "dull",
        "nasty", "miserable", "unpleasant",
    ),
}  # fmt: skip

KINDS = ("plain", "turned", "denied")
PROMPT = "Review: {t}\nLabel:"


def _opposite(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]


def _text(rng: random.Random, topic: str, label: str, kind: str) -> str:
    one, two = rng.sample(TOPICS[topic], 2)
    says = rng.choice(OPINIONS[label])
    if kind == "denied":
        return f"The {one} of this {topic} was not {rng.choice(OPINIONS[_opposite(label)])}."
    if kind == "turned":
        first = rng.choice(OPINIONS[_opposite(label)])
        return f"The {one} of this {topic} was {first}, but the {two} was {says}."
    return f"The {one} of this {topic} was {rng.choice(OPINIONS[label])} and the {two} was {says}."


def _draw(rng: random.Random, split: Split, topic: str, label: str, kind: str) -> str:
    while True:
        text = _text(rng, topic, label, kind)
        if belongs(split, "sentiment", text):
            return text


def examples(split: Split, n: int, seed: int, *, topic: str | None = None, kind: str | None = None) -> list[Example]:
    """Reviews of one topic or of all, of one kind or of all, with as many of each label."""
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"sentiment: unknown topic {topic!r}; there are: {', '.join(TOPICS)}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"sentiment: unknown kind {kind!r}; there are: {', '.join(KINDS)}")
    rng = generator("sentiment", split, seed)
    made = []
    for i in range(n):
        label = LABELS[i % 2]
        about = topic or rng.choice(tuple(TOPICS))
        how = kind or rng.choice(("plain", "plain", "turned", "denied"))
        made.append(
            Example(
                prompt=PROMPT.format(t=_draw(rng, split, about, label, how)),
                answer=f" {label}",
                choices=tuple(f" {choice}" for choice in LABELS),
                cluster=about,
                fields={"topic": about, "kind": how},
            )
        )
    rng.shuffle(made)
    return made


def training_document(rng: random.Random, split: Split) -> Document:
    """One review with its label."""
    label = rng.choice(LABELS)
    kind = rng.choice(("plain", "plain", "turned", "denied"))
    text = _draw(rng, split, rng.choice(tuple(TOPICS)), label, kind)
    return Span(PROMPT.format(t=text)), Span(f" {label}", "answer"), Span("\n")
