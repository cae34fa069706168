"""The small world: text made by code, with questions whose answers are known.

Six tasks, each with unlimited seeded training documents and held-out evaluation examples:

- ``recall``: in-context recall of key-value records, at any distance;
- ``facts``: closed-book facts about invented people;
- ``openbook``: the same facts with a context that confirms or contradicts them;
- ``format``: instructions about the format of the answer;
- ``arithmetic``: sums and differences;
- ``sentiment``: labelled short reviews.

``examples`` gives test items, ``documents`` gives training text. Everything is a pure function of
its arguments and of ``WORLD_VERSION``, which rises when the same arguments would give other text.
How the splits are kept apart is said in :mod:`trimtab.world.split` and, per task, in its module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from trimtab.world import arithmetic, facts, formats, openbook, recall, sentiment
from trimtab.world.mixture import DEFAULT_MIXTURE, annotated_documents, documents
from trimtab.world.people import RELATIONS, Person, people
from trimtab.world.types import Document, Example, Span, Split

__all__ = [
    "DEFAULT_MIXTURE",
    "RELATIONS",
    "TASKS",
    "WORLD_VERSION",
    "Document",
    "Example",
    "Person",
    "Span",
    "Split",
    "annotated_documents",
    "documents",
    "examples",
    "people",
]

WORLD_VERSION: int = 1

_MAKERS: dict[str, Callable[..., list[Example]]] = {
    "recall": recall.examples,
    "facts": facts.examples,
    "openbook": openbook.examples,
    "format": formats.examples,
    "arithmetic": arithmetic.examples,
    "sentiment": sentiment.examples,
}

TASKS: tuple[str, ...] = tuple(_MAKERS)


def options(task: str) -> tuple[str, ...]:
    """Names of the options that ``examples`` takes for this task."""
    if task not in _MAKERS:
        raise ValueError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
    return tuple(list(inspect.signature(_MAKERS[task]).parameters)[3:])


def examples(task: str, split: Split, n: int, seed: int = 0, **task_options: object) -> list[Example]:
    """``n`` examples of a task; the same arguments always give the same examples.

    task_options  conditions of the task, e.g. ``records=32, filler=prose`` for recall or
                  ``agrees=False`` for openbook; see the ``examples`` function of each task.
    Raises ValueError if the task, the split, an option or its value is unknown.
    """
    allowed = options(task)
    for name in task_options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r} of task {task!r}; there are: {', '.join(allowed)}")
    if n < 0:
        raise ValueError(f"n must not be negative, but is {n}")
    return _MAKERS[task](split, n, seed, **task_options)
