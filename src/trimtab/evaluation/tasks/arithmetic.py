"""Sums and differences of two-digit numbers that training never showed."""

from __future__ import annotations

from typing import ClassVar

from trimtab.evaluation.tasks._world import WorldTask

__all__ = ["Arithmetic"]


class Arithmetic(WorldTask):
    """Exact match of the answer, up to the end of its line."""

    name: ClassVar[str] = "arithmetic"
    summary: ClassVar[str] = "Sums and differences of two-digit numbers that training never showed."
    world_task: ClassVar[str] = "arithmetic"
