"""The contract of the weights room: one linear layer and its statistics in, a compressed tensor out.

A method never moves data, hooks modules or reads files: `trimtab.weights.compress` does, for all methods alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.core.method import Method

if TYPE_CHECKING:
    from trimtab.core.recipe import Step
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView
    from trimtab.tensors.compressed import CompressedTensor

Notes = dict[str, float | str]
"""What a method reports of one linear, for the run record."""


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """A *representation* method: replaces each targeted linear's weight by a compressed tensor.

    targets    shell patterns over linear names or roles; the default takes every linear of every block
               (embeddings, norms and the output head are never touched)
    """

    room: ClassVar[str] = "weights"

    targets: tuple[str, ...] = ("*",)

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the input that `compress` wants with these options; empty if it uses no data."""
        return frozenset()

    @abstractmethod
    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        """The compressed weight of `linear` and notes for the run record (damping used, fallback taken, ...).

        `stats` is None exactly if `needs` is empty. All arithmetic in float32 or wider. Must be deterministic.
        The room adds the errors that every method reports: see `trimtab.weights._compress`.
        """

    @abstractmethod
    def check_linear(self, linear: LinearView) -> None:
        """Raise TargetError if the options do not fit this linear."""

    def check_targets(self, linears: Sequence[LinearView]) -> None:
        """`check_linear` of all targets; called before any work starts. Override to name a fix that fits them all."""
        for linear in linears:
            self.check_linear(linear)

    @classmethod
    def refuses_after(cls, earlier: Sequence[Step]) -> str | None:
        taken = [step.method for step in earlier if step.room == "weights"]
        if taken:
            return f"the linear layers are already compressed by '{taken[-1]}'. Use one of the two."
        return None
