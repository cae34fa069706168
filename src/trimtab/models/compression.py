"""`trimtab.compress`: apply methods to a model, in place, and report what changed; the same for all rooms that do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError
from trimtab.core.files import refuse_occupied
from trimtab.core.recipe import Recipe
from trimtab.core.run_record import RunRecord, versions
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.conversion import Calibration, calibration_set, described, unchanged
from trimtab.models.counting import ledger_of
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.info import info_of
from trimtab.models.model_method import Mode, ModelMethod
from trimtab.models.run_state import RunState, model_sha256
from trimtab.models.saving import describe, save

StateKind = TypeVar("StateKind", bound=RunState)


@dataclass(frozen=True, slots=True)
class Run:
    """One method being applied.

    calibration    None exactly if the method's `needs_text` is False
    config         what identifies the run: recipe, mode, text
    directory      where its state is kept; None: nowhere
    discard        remove the state of another run that is there
    """

    model: PreTrainedModel
    calibration: CalibrationSet | None
    mode: Mode
    seed: int
    record: RunRecord
    progress: bool
    config: dict[str, Any]
    directory: Path | None
    discard: bool

    def state(self, kind: type[StateKind]) -> StateKind | None:
        """The state directory of this run, opened or begun; None: it has none. Raises CheckpointError, OutputError."""
        if self.directory is None:
            return None
        with self.record.timed("fingerprint"):
            model = model_sha256(self.model)
            fingerprint = {**self.config, "seed": self.seed, "model": model, "versions": versions()}
            return kind(self.directory, fingerprint, discard=self.discard)


def compress(
    model: PreTrainedModel,
    method: ModelMethod | Recipe,
    *,
    calibration: Calibration | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Let `method` change the linear layers that it targets, in place, and return the same model.

    Weights become compressed tensors, linears become smaller, layers compute otherwise. A recipe may have several
    steps: methods that slice, then one that compresses or replaces what they left.

    calibration    what statistics are gathered on: a CalibrationSet, or a text file (or text) to make one from; None:
                   128 sequences of the prose that comes with trimtab. Not read if the method needs no text
    mode           "sequential": each layer sees inputs that the compressed layers before it produce (five runs of a
                   block, four of them cut short); "dense": inputs of the original model (one run). None: the method's
                   own: "dense" for those that slice or repair nothing, else "sequential"
    seed           of the choice of calibration sequences and of sampled statistics
    state_dir      where finished blocks, and what a search found, are kept; the same call with the same directory
                   after a kill computes only what is missing, and its result is the same to the bit
    progress       show a bar on standard error

    `model.trimtab` then holds the recipe and the record of the run, with what the method notes of each changed linear,
    and what was left alone and why.

    Everything that can be is checked before the first layer changes. Raises ConfigError, TargetError (a pattern that
    matches nothing, options that do not fit a layer), CompositionError (already compressed), NumericsError (NaN or
    infinity in weights or activations, by name), DataError, CheckpointError and OutputError (`state_dir`). After an
    error in the middle, the model in memory is partly compressed: load it again.
    """
    return _compress(model, method, calibration, mode, seed, state_dir, progress)


def compress_to(
    model: PreTrainedModel,
    method: ModelMethod | Recipe,
    output: str | Path,
    *,
    force: bool = False,
    calibration: Calibration | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """`compress`, then save to the directory `output`; killed at any point, the same call continues.

    Finished blocks are kept in `OUTPUT.partial` beside it until the checkpoint is written. Nothing is at `output`
    before it is complete, and what was there (`force`) stays until then. With `force`, the state of an unfinished run
    with other options is discarded; without, it is refused. Raises what `compress` raises, and OutputError.
    """
    output = Path(output)
    refuse_occupied(output, force)
    state_dir = output.with_name(f"{output.name}.partial")
    _compress(model, method, calibration, mode, seed, state_dir, progress, discard_state=force)
    save(model, output, force=force)
    shutil.rmtree(state_dir, ignore_errors=True)
    return model


def _compress(
    model: PreTrainedModel,
    method: ModelMethod | Recipe,
    calibration: Calibration | None,
    mode: Mode | None,
    seed: int,
    state_dir: str | Path | None,
    progress: bool,
    discard_state: bool = False,
) -> PreTrainedModel:
    if mode not in (None, "sequential", "dense"):
        raise ConfigError(f"unknown calibration mode {mode!r}. Known: dense, sequential.")
    recipe = method if isinstance(method, Recipe) else Recipe.of(method)
    methods = _methods(recipe)
    info = info_of(model)
    whole = info.recipe.then(recipe) if info.recipe else recipe  # refuses what cannot follow what
    chosen = calibration_set(model, calibration, seed) if any(step.needs_text for step in methods) else None
    for number, step in enumerate(methods):
        text = chosen if step.needs_text else None
        done = Recipe(whole.steps[: len(whole.steps) - len(methods) + number + 1])
        config = {"recipe": done.to_dict(), "mode": mode or step.own_mode, "calibration": described(text)}
        directory = None if state_dir is None else Path(state_dir)
        if directory is not None and len(methods) > 1:
            directory = directory / f"step-{number}"
        record = RunRecord(command="compress", config=config, seed=seed)
        run = Run(model, text, mode or step.own_mode, seed, record, progress, config, directory, discard_state)
        with record.timed("total"):
            step.apply(run)
        if info.record is not None:
            _keep_of(info.record, record)
        record.unchanged = list(unchanged(model, record))
        record.ledger = ledger_of(model).to_dict()
        info.recipe, info.record = done, record
        describe(model)
        fast_decoding(model)
    return model


def _methods(recipe: Recipe) -> list[ModelMethod]:
    """The steps, built. Raises ConfigError for steps of rooms that do not change a model, or none."""
    methods = []
    for step, built in zip(recipe.steps, recipe.methods(), strict=True):
        if not isinstance(built, ModelMethod):
            raise ConfigError(
                f"compress takes methods of the rooms weights and layers, not '{step.method}' ({step.room})."
            )
        methods.append(built)
    if not methods:
        raise ConfigError("compress takes at least one method of the rooms weights and layers; this recipe has none.")
    return methods


def _keep_of(earlier: RunRecord, record: RunRecord) -> None:
    """Enter into the record of a later step what the steps before it did."""
    again = {entry["linear"] for entry in record.changed}
    record.changed = [entry for entry in earlier.changed if entry["linear"] not in again] + record.changed
    record.changed_dense = list(dict.fromkeys([*earlier.changed_dense, *record.changed_dense]))
    record.metrics = {**earlier.metrics, **record.metrics}
    for name, seconds in earlier.seconds.items():
        record.seconds[name] = record.seconds.get(name, 0.0) + seconds
