"""Closed-book facts about the invented people of the small world, in a wording that training never used."""

from __future__ import annotations

from typing import ClassVar

from trimtab.evaluation.tasks._world import WorldTask

__all__ = ["Facts"]


class Facts(WorldTask):
    """Exact match of the answer, up to the end of its line."""

    name: ClassVar[str] = "facts"
    summary: ClassVar[str] = (
        "Closed-book facts about the invented people of the small world, in a wording that training never used."
    )
    world_task: ClassVar[str] = "facts"
