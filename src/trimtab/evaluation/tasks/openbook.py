"""Open-book questions whose context confirms or contradicts what the model has memorised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from trimtab.evaluation.tasks._world import WorldTask
from trimtab.world.types import Example

__all__ = ["Openbook"]


class Openbook(WorldTask):
    """The right answer is what the context says; half of the contexts contradict the memory.

    exact_match_agree      context and memory say the same
    exact_match_conflict   the context must win over the memory
    """

    name: ClassVar[str] = "openbook"
    summary: ClassVar[str] = "Questions whose context agrees with the memorised fact, or contradicts it."
    world_task: ClassVar[str] = "openbook"
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "exact_match_agree": True,
        "exact_match_conflict": True,
        "answer_nats": False,
    }

    def metric_of(self, example: Example) -> str:
        return "exact_match_agree" if example.fields["agrees"] else "exact_match_conflict"
