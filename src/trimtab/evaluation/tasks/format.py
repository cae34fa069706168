"""Instructions on the format of an answer, on words that training never combined so."""

from __future__ import annotations

from typing import ClassVar

from trimtab.evaluation.tasks._world import WorldTask

__all__ = ["Format"]


class Format(WorldTask):
    """Exact match of the answer, up to the end of its line."""

    name: ClassVar[str] = "format"
    summary: ClassVar[str] = "Instructions on the format of an answer, on words that training never combined so."
    world_task: ClassVar[str] = "format"
