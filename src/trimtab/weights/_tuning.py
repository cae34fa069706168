"""What a method may use after all blocks are compressed, to tune them together against the original model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from trimtab.core.run_record import RunRecord
from trimtab.models.calibration import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear


@dataclass(frozen=True, slots=True)
class Tuning:
    """Handed to `WeightMethod.tune`.

    model          compressed; `tune` changes it in place: `set_tensor` of its CompressedLinears, and dense parameters
    teacher        the original model, without gradients, in evaluation mode
    calibration    the text; None if the method's `needs_text` is False
    record         of the run
    progress       show a bar on standard error

    Tuning must be deterministic in the seed: a run that was killed tunes again from the compressed blocks.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel
    calibration: CalibrationSet | None
    seed: int
    record: RunRecord
    progress: bool

    def layers(self) -> Iterator[tuple[str, CompressedLinear]]:
        """Name and module of each compressed linear, in model order."""
        for name, module in self.model.named_modules():
            if isinstance(module, CompressedLinear):
                yield name, module
