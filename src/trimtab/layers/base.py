"""The contract of the layers room: one block and statistics in; modules that take the place of others out.

A method changes what a layer computes, not how its weights are stored. It names sub-modules of a block and gives for
each a module with the same call signature, and it says which state its layers keep between tokens. Moving data,
hooking modules, installing, reporting and saving are the room's: `trimtab.compress` does them for all methods.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.models.model_method import ModelMethod

if TYPE_CHECKING:
    from trimtab.core.recipe import Step
    from trimtab.models.compressed_linear import CompressedLinear
    from trimtab.models.compression import Run
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Stats
    from trimtab.models.views import BlockView, LinearView

Notes = dict[str, float | str]
"""What a method reports of one module, for the run record."""

LayerState = Literal["keys and values"]
"""What the layers of a converted model keep between tokens: the model's own KV cache, whatever method of the cache room
holds it. A method that keeps something else adds its name here and a cache that knows it."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """The module that takes the place of a linear, and what was noted about it.

    module    what `trimtab.models` can save and load: a layer over a tensor of `trimtab.tensors`
    """

    module: CompressedLinear
    notes: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerMethod(ModelMethod):
    """A method that replaces sub-modules of the blocks."""

    room: ClassVar[str] = "layers"
    state: ClassVar[LayerState] = "keys and values"

    @abstractmethod
    def check_linear(self, linear: LinearView) -> None:
        """Raise TargetError if the options do not fit this linear; called for all before any work starts."""

    def apply(self, run: Run) -> None:
        from trimtab.layers._convert import apply

        apply(self, run)

    def prepare(self, planning: Planning) -> LayerMethod:
        """Called once, before the first block: the method that replaces, with everything that has to be known of the
        whole model. The model must be as it was afterwards. The default is the method itself."""
        return self

    @abstractmethod
    def replace(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]
    ) -> Mapping[str, Replacement]:
        """Name of each of `linears`, some or all targets of `block` -> what takes its place.

        `stats` is site -> the statistics in `needs`. Must be deterministic. The room installs the result.
        """

    @classmethod
    def refuses_after(cls, earlier: Sequence[Step]) -> str | None:
        taken = [step.method for step in earlier if step.room == "layers"]
        if taken:
            return f"the layers are already converted by '{taken[-1]}'. Use one of the two."
        return None
