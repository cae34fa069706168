"""What a model believes of one answer: values with weights, and how texts become values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.errors import DataError
from trimtab.decoding._decisions.rules import Array

Value = float | str
Parse = Callable[[str], Value | None]
"""Text of an answer -> its value; None: it is no answer."""
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def number_in(text: str) -> float | None:
    """The number that the whole text spells, white space around it aside; None if it spells none.

    >>> number_in(" 07 "), number_in("7 or 8")
    (7.0, None)
    """
    text = text.strip()
    return float(text) if _NUMBER.fullmatch(text) else None


def value_in(text: str) -> Value | None:
    """The number that the text spells, or its words with single spaces between them; None if it is blank."""
    number = number_in(text)
    return number if number is not None else " ".join(text.split()) or None


@dataclass(frozen=True)
class Outcomes:
    """Different values of one answer and how likely each is.

    values    [n], each once: texts of equal value count together
    texts     [n] how each of them is written, the likeliest of its texts
    weights   [n] float64, sum 1
    mass      of a label set the probability of all labels before they were made to sum to 1; of draws the share that
              was an answer
    dropped   draws that were no answer
    """

    values: tuple[Value, ...]
    texts: tuple[str, ...]
    weights: Array
    mass: float
    dropped: int = 0

    @classmethod
    def of(cls, texts: Sequence[str], weights: Array, parse: Parse, *, mass: float) -> Outcomes:
        """Merge texts [m] of equal value, leave out those that are none.

        Raises DataError if no text is an answer.
        """
        found: dict[Value, dict[str, float]] = {}
        dropped = 0
        for text, weight in zip(texts, weights, strict=True):
            if (value := parse(text)) is None:
                dropped += 1
                continue
            own = found.setdefault(value, {})
            own[text.strip()] = own.get(text.strip(), 0.0) + float(weight)
        total = np.array([sum(own.values()) for own in found.values()])
        if not found or not total.sum() > 0:
            shown = ", ".join(repr(text[:20]) for text in texts[:4])
            raise DataError(
                f"none of {len(texts)} texts is an answer: {shown}. Draw more samples, mend the prompt, or give the "
                "answers there are as labels."
            )
        return cls(
            tuple(found),
            tuple(max(own, key=own.__getitem__) for own in found.values()),
            total / total.sum(),
            mass,
            dropped,
        )

    def numbers(self, metric: str) -> Array:
        """The values [n] float64. Raises DataError if one is no number."""
        if words := [value for value in self.values if isinstance(value, str)]:
            raise DataError(f"{metric} is for numbers, but '{words[0]}' is an answer.")
        return np.array(self.values, dtype=np.float64)

    def probability(self, value: Value) -> float:
        """That the answer has this value."""
        return float(sum(w for v, w in zip(self.values, self.weights, strict=True) if v == value))
