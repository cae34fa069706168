"""The values that the small world hands out: one test item, one training document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Split = Literal["train", "eval"]

SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    ``prompt + answer`` is exactly how the pair appears in a training document; a prompt never ends
    in white space, so tokenizing the two parts one by one gives the same tokens as tokenizing them
    together.

    choices  all admissible answers, the right one included, for multiple-choice scoring; empty
             where the answer is open.
    cluster  name shared by examples that are not independent of each other (the same person, the
             same kind of review), for clustered confidence intervals; None if all are independent.
    fields   the conditions under which the example was drawn (number of records, template, ...).
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    cluster: str | None = None
    fields: dict[str, object] = field(default_factory=dict)


class Span(NamedTuple):
    """A piece of a training document.

    role  "plain" ordinary text; "answer" what the model must know or look up; "noise" text drawn at
          random, which no model can predict (the records of a recall document).
    """

    text: str
    role: Literal["plain", "answer", "noise"] = "plain"


Document = tuple[Span, ...]


def text_of(document: Document) -> str:
    """The document as one string."""
    return "".join(span.text for span in document)
