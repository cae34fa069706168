"""Convert the layers of a model in place: what is the same for every method of this room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import CompositionError, ConfigError
from trimtab.core.files import refuse_occupied
from trimtab.core.recipe import Recipe
from trimtab.core.run_record import RunRecord, versions
from trimtab.layers.base import LayerMethod, Replacement
from trimtab.models.calibration import BlockStream
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.conversion import Calibration, calibration_set, check_weight, described, unchanged
from trimtab.models.counting import ledger_of
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.info import info_of
from trimtab.models.planning import Planning
from trimtab.models.run_state import RunState, model_sha256
from trimtab.models.saving import describe, save
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.sparse_inputs import every_token_sparse

Mode = Literal["dense", "sequential"]


def convert(
    model: PreTrainedModel,
    method: LayerMethod | Recipe,
    *,
    calibration: Calibration | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Let `method` replace layers of the model, in place, and return the same model.

    calibration    what statistics are gathered on: a CalibrationSet, or a text file (or text) to make one from; None:
                   128 sequences of the prose that comes with trimtab. Not read if the method needs no text
    mode           "sequential": statistics of inputs that the converted layers in front of each layer produce (five
                   runs of a block, four of them cut short); "dense": of the original model (one run). None: sequential
    seed           of the choice of calibration sequences, of sampled statistics and of a method's search
    state_dir      where a search keeps what it has found; the same call with the same directory after a kill computes
                   only what is missing, and its result is the same to the bit
    progress       show a bar on standard error

    `model.trimtab` then holds the recipe and the record of the run, with the method's notes of each changed layer and
    what was left alone and why; its ledger says what the model takes and what a decoded token reads.

    Everything that can be is checked before the first layer changes. Raises ConfigError, TargetError (a pattern that
    matches nothing, options that do not fit a layer), CompositionError (layers that are compressed or converted),
    NumericsError (NaN or infinity, by name), DataError, CheckpointError and OutputError (`state_dir`). After an error
    in the middle, the model in memory is partly converted: load it again.
    """
    return _convert(model, method, calibration, mode, seed, state_dir, progress)


def convert_to(
    model: PreTrainedModel,
    method: LayerMethod | Recipe,
    output: str | Path,
    *,
    force: bool = False,
    calibration: Calibration | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """`convert`, then save to the directory `output`; killed at any point, the same call continues.

    What a search has found is kept in `OUTPUT.partial` beside it until the checkpoint is written. With `force`, what
    was at `output` stays until the new checkpoint is complete, and the state of a run with other options is discarded.
    Raises what `convert` raises, and OutputError.
    """
    output = Path(output)
    refuse_occupied(output, force)
    state_dir = output.with_name(f"{output.name}.partial")
    _convert(model, method, calibration, mode, seed, state_dir, progress, discard_state=force)
    save(model, output, force=force)
    shutil.rmtree(state_dir, ignore_errors=True)
    return model


def _convert(
    model: PreTrainedModel,
    method: LayerMethod | Recipe,
    calibration: Calibration | None,
    mode: Mode | None,
    seed: int,
    state_dir: str | Path | None,
    progress: bool,
    discard_state: bool = False,
) -> PreTrainedModel:
    if mode not in (None, "sequential", "dense"):
        raise ConfigError(f"unknown calibration mode {mode!r}. Known: dense, sequential.")
    mode = mode or "sequential"
    recipe, built = _resolve(method)
    info = info_of(model)
    recipe = info.recipe.then(recipe) if info.recipe else recipe
    targets = _check_targets(ModelView.of(model), built)
    chosen = calibration_set(model, calibration, seed) if built.needs_text else None
    config = {"recipe": recipe.to_dict(), "mode": mode, "calibration": described(chosen)}
    record = RunRecord(command="convert", config=config, seed=seed)
    with record.timed("total"), torch.no_grad(), every_token_sparse():
        state = None
        if state_dir is not None:
            with record.timed("fingerprint"):
                fingerprint = {**config, "seed": seed, "model": model_sha256(model), "versions": versions()}
                state = RunState(state_dir, fingerprint, discard=discard_state)
        with record.timed("prepare"):
            linears = tuple(linear for linear in ModelView.of(model).linears if linear.name in targets)
            directory = None if state is None else state.path
            prepared = built.prepare(Planning(model, linears, chosen, seed, directory, record, progress))
            del linears  # they keep the replaced layers alive
        with bars.progress(f"converting with {built.name()}", len(targets), shown=progress) as advance:
            _replace_all(model, prepared, targets, chosen, mode, seed, record, advance)
    record.metrics["state"] = built.state
    if info.record is not None:
        _keep_of(info.record, record)
    record.unchanged = list(unchanged(model, record))
    record.ledger = ledger_of(model).to_dict()
    info.recipe, info.record = recipe, record
    describe(model)
    fast_decoding(model)
    return model


def _keep_of(earlier: RunRecord, record: RunRecord) -> None:
    """Enter into the record what steps before this one did: layers that it left alone, what they measured, seconds."""
    again = {entry["linear"] for entry in record.changed}
    record.changed = [entry for entry in earlier.changed if entry["linear"] not in again] + record.changed
    record.changed_dense = list(earlier.changed_dense)
    record.metrics = {**earlier.metrics, **record.metrics}
    for name, seconds in earlier.seconds.items():
        record.seconds[name] = record.seconds.get(name, 0.0) + seconds


def _resolve(method: LayerMethod | Recipe) -> tuple[Recipe, LayerMethod]:
    """The recipe, and its one step for this room."""
    recipe = method if isinstance(method, Recipe) else Recipe.of(method)
    built = recipe.methods()
    if len(built) != 1 or not isinstance(built[0], LayerMethod):
        steps = [f"'{type(step).name()}' ({step.room})" for step in built]
        raise ConfigError(f"convert takes a recipe with one step of the layers room, not {', '.join(steps) or 'none'}.")
    return recipe, built[0]


def _check_targets(view: ModelView, method: LayerMethod) -> frozenset[str]:
    """Names of the linears to replace, each of which the method accepts."""
    targets = view.select(method.targets)
    for linear in targets:
        if linear.compressed is not None:
            kinds = "+".join(part.kind for part in linear.compressed.tensor.parts)
            raise CompositionError(
                f"{linear.name} is already compressed ({kinds}); '{type(method).name()}' needs its dense weight. Start "
                "from the uncompressed model, or leave this layer out with targets."
            )
        method.check_linear(linear)
        check_weight(linear)
    return frozenset(linear.name for linear in targets)


def _replace_all(
    model: PreTrainedModel,
    method: LayerMethod,
    targets: frozenset[str],
    calibration: CalibrationSet | None,
    mode: Mode,
    seed: int,
    record: RunRecord,
    advance: Callable[[str], None],
) -> None:
    view = ModelView.of(model)
    last = max(linear.block for linear in view.linears if linear.name in targets)  # beyond it nothing is gathered
    stream = BlockStream(view, calibration, seed=seed) if calibration is not None and method.needs else None
    del view
    for index in range(last + 1):
        block = ModelView.of(model).blocks[index]
        sites = list(block.sites.values())
        # one group of linears for each run of the block: all that it has, or those that read the same input
        for members in [[x for site in sites for x in site]] if mode == "dense" else sites:
            linears = [linear for linear in members if linear.name in targets]
            stats = {}
            if stream is not None and (linears or mode == "dense"):
                with record.timed("calibration"):
                    wanted = {linear.site: method.needs for linear in linears}
                    stats = stream.gather(block, wanted, advance=mode == "dense" and index < last)
            with record.timed("solve"):
                made = method.replace(block, linears, stats) if linears else {}
            for linear in linears:
                _install(linear, made[linear.name], record)
                advance(linear.name)
        if stream is not None and mode == "sequential" and index < last:
            with record.timed("calibration"):
                stream.advance(block)


def _install(linear: LinearView, made: Replacement, record: RunRecord) -> None:
    module = made.module.to(linear.weight.device).train(linear.module.training)
    entry: dict[str, Any] = {
        "linear": linear.name,
        "role": linear.role,
        "shape": [linear.out_features, linear.in_features],
        "nbytes": module.tensor.nbytes,
        **made.notes,
    }
    linear.replace(module)
    record.changed.append(entry)
