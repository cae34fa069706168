"""Compress the linear layers of a model in place: what is the same for every method of this room."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import CompositionError, ConfigError
from trimtab.core.files import refuse_occupied
from trimtab.core.recipe import Recipe
from trimtab.core.run_record import RunRecord, versions
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.conversion import Calibration, calibration_set, check_weight, described, unchanged
from trimtab.models.counting import ledger_of
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.info import info_of
from trimtab.models.narrow import settle_widths
from trimtab.models.planning import Planning
from trimtab.models.run_state import model_sha256
from trimtab.models.saving import describe, save
from trimtab.models.views import ModelView
from trimtab.tensors.metric import Metric
from trimtab.weights._loop import BlockLoop
from trimtab.weights._pruning.plan import RECORDED, Plan
from trimtab.weights._state import State
from trimtab.weights._tuning import Tuning
from trimtab.weights.base import Mode, SliceMethod, WeightMethod


def compress(
    model: PreTrainedModel,
    method: WeightMethod | Recipe,
    *,
    calibration: Calibration | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Replace the linear layers that `method` targets by compressed ones, in place, and return the same model.

    A recipe may have several steps: methods that slice, then one that compresses what they left.

    calibration    what statistics are gathered on: a CalibrationSet, or a text file (or text) to make one from; None:
                   128 sequences of the prose that comes with trimtab. Not read if the method needs no text
    mode           "sequential": each layer sees inputs that the compressed layers before it produce (five runs of a
                   block, four of them cut short); "dense": inputs of the original model (one run). None: the method's
                   own, "dense" for those that slice and "sequential" for the others
    seed           of the choice of calibration sequences and of sampled statistics
    state_dir      where finished blocks are kept; the same call with the same directory after a kill computes only what
                   is missing, and its result is the same to the bit
    progress       show a bar on standard error

    `model.trimtab` then holds the recipe and the record of the run. For each changed linear the record has the method's
    notes, `relative_weight_error` |W~ - W|^2 / |W|^2 and, if the Gram matrix was gathered, `relative_error`
    tr((W~ - W) H (W~ - W)^T) / tr(W H W^T); it also lists what was left alone and why.

    Everything that can be is checked before the first layer changes. Raises ConfigError, TargetError (a pattern that
    matches nothing, options that do not fit a layer), CompositionError (already compressed), NumericsError (NaN or
    infinity in weights or activations, by name), DataError, CheckpointError and OutputError (`state_dir`). After an
    error in the middle, the model in memory is partly compressed: load it again.
    """
    return _compress(model, method, calibration, mode, seed, state_dir, progress)


def compress_to(
    model: PreTrainedModel,
    method: WeightMethod | Recipe,
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
    method: WeightMethod | Recipe,
    calibration: Calibration | None,
    mode: Mode | None,
    seed: int,
    state_dir: str | Path | None,
    progress: bool,
    discard_state: bool = False,
) -> PreTrainedModel:
    if mode not in (None, "sequential", "dense"):
        raise ConfigError(f"unknown calibration mode {mode!r}. Known: dense, sequential.")
    info = info_of(model)
    steps = _steps(method)
    for recipe, _ in steps:
        if info.recipe:
            info.recipe.then(recipe)  # refuses what cannot follow, before anything changes
    chosen = calibration_set(model, calibration, seed) if any(built.needs_text for _, built in steps) else None
    for number, (recipe, built) in enumerate(steps):
        text = chosen if built.needs_text else None
        step_dir = Path(state_dir) / f"step-{number}" if state_dir is not None and len(steps) > 1 else state_dir
        _step(model, recipe, built, text, mode or built.own_mode, seed, step_dir, progress, discard_state)
    return model


def _step(
    model: PreTrainedModel,
    recipe: Recipe,
    built: WeightMethod,
    chosen: CalibrationSet | None,
    mode: Mode,
    seed: int,
    state_dir: str | Path | None,
    progress: bool,
    discard_state: bool,
) -> None:
    """Apply one method to the model as earlier steps left it."""
    info = info_of(model)
    earlier = info.record
    recipe = info.recipe.then(recipe) if info.recipe else recipe
    targets = _check_targets(ModelView.of(model), built)
    config = {"recipe": recipe.to_dict(), "mode": mode, "calibration": described(chosen)}
    record = RunRecord(command="compress", config=config, seed=seed)
    with record.timed("total"):
        state = None
        if state_dir is not None:
            with record.timed("fingerprint"):
                fingerprint = {**config, "seed": seed, "model": model_sha256(model), "versions": versions()}
                state = State(state_dir, fingerprint, discard=discard_state)
        with record.timed("prepare"):
            linears = tuple(linear for linear in ModelView.of(model).linears if linear.name in targets)
            directory = None if state is None else state.path
            planning = Planning(model, linears, chosen, seed, directory, record, progress)
            prepared = built.prepare(planning)
            del linears, planning  # they keep the replaced layers alive
        teacher = _frozen_copy(model) if prepared.tunes else None
        bar = bars.progress(f"compressing with {built.name()}", len(targets), shown=progress)
        with bar as advance:
            seen = None if chosen is None else prepared.statistics_text(chosen)
            BlockLoop(model, prepared, targets, seen, mode, seed, state, record).run(advance)
        if teacher is not None:
            with record.timed("tune"):
                record.metrics["tuning"] = prepared.tune(Tuning(model, teacher, chosen, seed, record, progress))
            _measure_again(model, teacher, record)
    if isinstance(built, SliceMethod):
        settle_widths(model)
    if earlier is not None:
        _keep_of(earlier, record)
    record.unchanged = list(unchanged(model, record))
    record.ledger = ledger_of(model).to_dict()
    info.recipe, info.record = recipe, record
    describe(model)
    fast_decoding(model)


def _keep_of(earlier: RunRecord, record: RunRecord) -> None:
    """Enter into the record of a later step what the steps before it did: layers that it left alone, kept units,
    seconds."""
    again = {entry["linear"] for entry in record.changed}
    record.changed = [entry for entry in earlier.changed if entry["linear"] not in again] + record.changed
    record.changed_dense = list(dict.fromkeys([*earlier.changed_dense, *record.changed_dense]))
    first, then = (Plan.of_rows(run.metrics.get(RECORDED, ())) for run in (earlier, record))
    record.metrics = {**earlier.metrics, **record.metrics}
    if first.entries:
        record.metrics[RECORDED] = first.followed_by(then).rows()
    for name, seconds in earlier.seconds.items():
        record.seconds[name] = record.seconds.get(name, 0.0) + seconds


def _steps(method: WeightMethod | Recipe) -> list[tuple[Recipe, WeightMethod]]:
    """The steps, each as a recipe of its own and built. Raises ConfigError for steps of other rooms, or none."""
    recipe = method if isinstance(method, Recipe) else Recipe.of(method)
    steps = []
    for step, built in zip(recipe.steps, recipe.methods(), strict=True):
        if not isinstance(built, WeightMethod):
            raise ConfigError(f"compress takes steps of the weights room, not '{step.method}' ({step.room}).")
        steps.append((Recipe((step,)), built))
    if not steps:
        raise ConfigError("compress takes at least one step of the weights room; this recipe has none.")
    return steps


def _check_targets(view: ModelView, method: WeightMethod) -> frozenset[str]:
    """Names of the linears to compress, each of which the method accepts."""
    for linear in view.linears:
        if linear.compressed is not None:
            raise CompositionError(
                f"{linear.name} is already compressed. Start from the uncompressed model; methods of the weights room "
                "do not follow one another."
            )
    targets = method.targeted(view)
    method.check_targets(targets)
    method.check_model(view.model, targets)
    for linear in targets:
        check_weight(linear)
    return frozenset(linear.name for linear in targets)


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is now, in evaluation mode and without gradients."""
    teacher = copy.deepcopy(model)
    teacher.train(False)
    teacher.requires_grad_(False)
    return teacher


def _measure_again(model: PreTrainedModel, teacher: PreTrainedModel, record: RunRecord) -> None:
    """Replace the errors that were noted before tuning by those of the tuned weights."""
    original = {linear.name: linear.weight for linear in ModelView.of(teacher).linears}
    identity = Metric.identity()
    for entry in record.changed:
        entry.pop("relative_error", None)
        if not record.changed_dense:
            tuned = model.get_submodule(entry["linear"])
            assert isinstance(tuned, CompressedLinear)
            entry["relative_weight_error"] = identity.relative_error(original[entry["linear"]], tuned.dequantize())
