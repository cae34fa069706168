"""What methods share that change the layers of a model in place: those of the rooms weights and layers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.core.method import Method

if TYPE_CHECKING:
    from trimtab.models.compression import Run
    from trimtab.models.statistics import Need
    from trimtab.models.views import LinearView, ModelView

Mode = Literal["sequential", "dense"]


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """A method that `trimtab.compress` applies to a model.

    targets    shell patterns over linear names or roles; the default takes every linear of every block
               (embeddings, norms and the output head are never replaced)
    """

    own_mode: ClassVar[Mode] = "sequential"
    """How its statistics are gathered if nothing else is asked for; see `compress`."""

    targets: tuple[str, ...] = ("*",)

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the inputs that this method wants with these options; empty if it uses none."""
        return frozenset()

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read at all: for statistics, or by other steps of the method."""
        return bool(self.needs)

    def targeted(self, view: ModelView) -> tuple[LinearView, ...]:
        """The linears that `targets` names. Raises TargetError for a pattern that matches none."""
        return view.select(self.targets)

    @abstractmethod
    def apply(self, run: Run) -> None:
        """Change `run.model`, which is as earlier steps left it, and say in `run.record` what changed. Everything that
        can be is checked before the first layer changes. A room does this for all of its methods."""
