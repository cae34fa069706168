"""The contract of the weights room: a linear layer, or a block of them, and statistics in; smaller ones out.

    WeightMethod    what all have: targets, statistics, checks; `prepare` before the first block, `tune` after the last
    LinearMethod    compresses one linear at a time
    BlockMethod     compresses the linears of one block together, because it folds scales into norms or measures the
                    output of the whole attention or MLP
    SliceMethod     makes the linears of one block smaller: it removes neurons, or dimensions of heads

A method never moves data, hooks modules or reads files: `trimtab.compress` does, for all methods alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trimtab.core.registry import method_class
from trimtab.models.model_method import Mode, ModelMethod

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.core.recipe import Step
    from trimtab.models.calibration_set import CalibrationSet
    from trimtab.models.compression import Run
    from trimtab.models.narrow import HeadGeometry
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Stats
    from trimtab.models.views import BlockView, LinearView
    from trimtab.tensors.compressed import CompressedTensor
    from trimtab.weights._block_run import BlockRun
    from trimtab.weights._pruning.plan import PlanEntry
    from trimtab.weights._tuning import Tuning

Notes = dict[str, float | str]
"""What a method reports of one linear, for the run record."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """The new weight of one linear and what was noted about it."""

    tensor: CompressedTensor
    notes: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompressedBlock:
    """What a BlockMethod makes of one block.

    linears    name -> compressed weight, for each targeted linear of the block
    dense      name of a parameter of the model, such as `model.layers.0.input_layernorm.weight` -> its new values, in
               the shape of the parameter
    """

    linears: Mapping[str, Compressed]
    dense: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NarrowLinear:
    """What a linear becomes when units are cut out of it: weight [out', in'] and bias [out'], dense."""

    weight: Tensor
    bias: Tensor | None
    notes: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlicedBlock:
    """What a SliceMethod makes of one block.

    linears    name -> smaller linear, for each targeted linear that changes
    heads      what its attention has left, None if that stays as it is
    plan       which units are kept, of those that were chosen and not rotated into others
    """

    linears: Mapping[str, NarrowLinear]
    heads: HeadGeometry | None = None
    plan: tuple[PlanEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightMethod(ModelMethod):
    """Makes linears smaller. A *representation* method replaces each targeted weight by a compressed tensor; a
    *structural* one (SliceMethod) replaces it by a smaller one.
    """

    room: ClassVar[str] = "weights"

    def statistics_text(self, calibration: CalibrationSet) -> CalibrationSet:
        """The part of the calibration text that statistics are gathered on. The rest is for `tune` to choose by."""
        return calibration

    @property
    def tunes(self) -> bool:
        """Whether `tune` does anything with these options; the original model is then kept until the end."""
        return False

    @abstractmethod
    def check_linear(self, linear: LinearView) -> None:
        """Raise TargetError if the options do not fit this linear."""

    def check_targets(self, linears: Sequence[LinearView]) -> None:
        """`check_linear` of all targets; called before any work starts. Override to name a fix that fits them all."""
        for linear in linears:
            self.check_linear(linear)

    def check_model(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        """Raise BudgetError if the options ask of the whole model what cannot be; called before any work starts."""

    def apply(self, run: Run) -> None:
        from trimtab.weights._compress import apply

        apply(self, run)

    def prepare(self, planning: Planning) -> WeightMethod:
        """Called once, after the checks and before the first block: the method that compresses, with everything that
        has to be known of the whole model (a configuration per matrix, say). The default is the method itself."""
        return self

    def tune(self, tuning: Tuning) -> Notes:
        """Called once, after the last block, if `tunes`: change the compressed tensors of the model together."""
        raise NotImplementedError(f"{type(self).__name__} sets `tunes` and has no `tune`")

    @classmethod
    def refuses_after(cls, earlier: Sequence[Step]) -> str | None:
        for step in earlier:
            if step.room == "weights" and not issubclass(method_class(step.method), SliceMethod):
                wanted = f" Cut with '{cls.name()}' first." if issubclass(cls, SliceMethod) else " Use one of the two."
                return f"the linear layers are already compressed by '{step.method}'.{wanted}"
        return None


class LinearMethod(WeightMethod):
    """A method that compresses one linear at a time."""

    @abstractmethod
    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        """The compressed weight of `linear` and notes for the run record (damping used, fallback taken, ...).

        `stats` is None exactly if `needs` is empty. All arithmetic in float32 or wider. Must be deterministic.
        The room adds the errors that every method reports: see `trimtab.weights._compress`.
        """


class BlockMethod(WeightMethod):
    """A method that compresses the linears of one block together."""

    @abstractmethod
    def compress_block(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats], run: BlockRun
    ) -> CompressedBlock:
        """All of `linears`, the targeted ones of `block`, and the dense parameters that change with them.

        `stats` is site -> the statistics in `needs`, of the block as it is before it is compressed. `run` runs modules
        of the block on calibration text. Whatever is changed in the block meanwhile is the method's to put back: the
        room installs the result. Arithmetic, determinism and errors as in LinearMethod.
        """


class SliceMethod(WeightMethod):
    """A structural method: cuts units out of the linears of one block, which stay dense and become smaller.

    Statistics are those of the original model unless "sequential" is asked for. What is cut may be compressed by a
    representation method afterwards, in one recipe.
    """

    own_mode: ClassVar[Mode] = "dense"

    def check_linear(self, linear: LinearView) -> None:
        """Units, not linears, are what options have to fit: see `check_targets`."""

    @abstractmethod
    def slice_block(self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]) -> SlicedBlock:
        """The smaller linears among `linears`, the targeted ones of `block`. The room puts them in place.

        `stats` is site -> the statistics in `needs`. Arithmetic, determinism and errors as in LinearMethod.
        """
