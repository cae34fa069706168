"""What a method may look at before the first block is changed: the whole model, its text, earlier answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.files import atomic_file, write_text_atomically
from trimtab.core.run_record import RunRecord
from trimtab.models.calibration import CalibrationSet
from trimtab.models.views import LinearView


@dataclass(frozen=True, slots=True)
class Planning:
    """Handed to the `prepare` of a method that changes a model (rooms weights and layers).

    model          uncompressed
    targets        the linears that will be replaced, in model order
    calibration    None if the method's `needs_text` is False
    directory      where answers are kept, so that a run that was killed does not ask again; None: nowhere
    record         of the run; `prepare` may enter metrics and time itself with `record.timed`
    """

    model: PreTrainedModel
    targets: tuple[LinearView, ...]
    calibration: CalibrationSet | None
    seed: int
    directory: Path | None
    record: RunRecord
    progress: bool

    def remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value `compute()`, from the state directory if an earlier run of the same recipe left it there."""
        if self.directory is None:
            return compute()
        path = self.directory / f"{name}.json"
        if not path.exists():
            write_text_atomically(path, json.dumps(compute()) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def remembered_tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `remembered`, for tensors."""
        if self.directory is None:
            return compute()
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            tensors = {key: value.cpu().contiguous() for key, value in compute().items()}
            with atomic_file(path) as partial:
                save_file(tensors, partial)
        return load_file(path)
