"""Instructions about the format of an answer: the same words, written in a way that is asked for.

Only the instruction says which format is wanted, so this measures whether a model attends to it.

Held out: (operation, words). A combination of the evaluation split never occurs in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from trimtab.world.lexicon import KEYS, VALUES
from trimtab.world.split import belongs, generator
from trimtab.world.types import Document, Example, Span, Split

OPERATIONS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "brackets": ("Put the words in brackets.", lambda w: f"[ {' '.join(w)} ]"),
    "stars": ("Put the words in stars.", lambda w: f"* {' '.join(w)} *"),
    "commas": ("Put commas between the words.", lambda w: ", ".join(w)),
    "dashes": ("Put dashes between the words.", lambda w: " - ".join(w)),
    "and": ("Put and between the words.", lambda w: " and ".join(w)),
    "twice": ("Say the words twice.", lambda w: " ".join(w + w)),
    "first": ("Say the first word only.", lambda w: w[0]),
    "last": ("Say the last word only.", lambda w: w[-1]),
}
"""Each operation: the instruction, and what it does to the words."""

WORDS = KEYS + VALUES
PROMPT = "Instruction: {i}\nWords: {w}\nAnswer:"


def _draw(rng: random.Random, split: Split, operation: str, count: int) -> tuple[str, str]:
    """Prompt and answer of an instance of this split."""
    instruction, apply = OPERATIONS[operation]
    while True:
        words = rng.sample(WORDS, count)
        if belongs(split, "format", operation, *words):
            prompt = PROMPT.format(i=instruction, w=" ".join(words))
            return prompt, f" {apply(words)}"


def examples(split: Split, n: int, seed: int, *, operation: str | None = None, words: int = 3) -> list[Example]:
    """Instructions of one operation, or of all alike, on this many words.

    choices  the same words in the formats of all operations.
    """
    if operation is not None and operation not in OPERATIONS:
        raise ValueError(f"format: unknown operation {operation!r}; there are: {', '.join(OPERATIONS)}")
    if not 2 <= words <= 4:
        raise ValueError(f"format: words must be in [2, 4], not {words}")
    rng = generator("format", split, seed)
    made = []
    for _ in range(n):
        chosen = operation or rng.choice(tuple(OPERATIONS))
        prompt, answer = _draw(rng, split, chosen, words)
        said = prompt.split("Words: ")[1].removesuffix("\nAnswer:").split()
        made.append(
            Example(
                prompt=prompt,
                answer=answer,
                choices=tuple(f" {apply(said)}" for _, apply in OPERATIONS.values()),
                fields={"operation": chosen, "words": words},
            )
        )
    return made


def training_document(rng: random.Random, split: Split) -> Document:
    """One instruction with its answer."""
    operation = rng.choice(tuple(OPERATIONS))
    prompt, answer = _draw(rng, split, operation, rng.choice((2, 3, 3, 4)))
    return Span(prompt, "noise"), Span(answer, "answer"), Span("\n", "answer")
