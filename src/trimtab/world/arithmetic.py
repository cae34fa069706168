"""Sums and differences of whole numbers, written digit by digit (each digit is a token).

Held out: (operation, numbers). For sums the order of the two numbers does not count, so that
23+45 and 45+23 are in the same split.
"""

from __future__ import annotations

import random

from trimtab.world.split import belongs, generator
from trimtab.world.types import Document, Example, Span, Split

OPERATIONS = ("add", "subtract")
MAX_DIGITS = 2


def _draw(rng: random.Random, split: Split, operation: str, digits: int) -> tuple[str, str]:
    """Prompt and answer of an instance of this split; differences are never negative."""
    while True:
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        small, large = sorted((a, b))
        if not belongs(split, "arithmetic", operation, small, large):
            continue
        if operation == "add":
            return f"{a}+{b}=", str(a + b)
        return f"{large}-{small}=", str(large - small)


def examples(split: Split, n: int, seed: int, *, operation: str | None = None, digits: int = 2) -> list[Example]:
    """Sums or differences (or both alike) of numbers with at most this many digits."""
    if operation is not None and operation not in OPERATIONS:
        raise ValueError(f"arithmetic: unknown operation {operation!r}; there are: {', '.join(OPERATIONS)}")
    if not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"arithmetic: digits must be in [1, {MAX_DIGITS}], not {digits}")
    rng = generator("arithmetic", split, seed)
    made = []
    for _ in range(n):
        chosen = operation or rng.choice(OPERATIONS)
        prompt, answer = _draw(rng, split, chosen, digits)
        made.append(Example(prompt, answer, fields={"operation": chosen, "digits": digits}))
    return made


def training_document(rng: random.Random, split: Split) -> Document:
    """Eight calculations, one per line, mostly of two digits."""
    spans: list[Span] = []
    for _ in range(8):
        digits = 1 if rng.random() < 0.1 else 2
        prompt, answer = _draw(rng, split, rng.choice(OPERATIONS), digits)
        spans += [Span(prompt, "noise"), Span(answer, "answer"), Span("\n", "answer")]
    return tuple(spans)
