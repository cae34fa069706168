"""Convert the layers of a model in place: what is the same for every method of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import CompositionError
from trimtab.core.run_record import RunRecord
from trimtab.layers.base import LayerMethod, Replacement
from trimtab.models.calibration import BlockStream
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import Run
from trimtab.models.conversion import check_weight
from trimtab.models.model_method import Mode
from trimtab.models.planning import Planning
from trimtab.models.run_state import RunState
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.sparse_inputs import every_token_sparse


@torch.no_grad()
def apply(method: LayerMethod, run: Run) -> None:
    """See `ModelMethod.apply`. The record has the method's notes of each layer that was replaced."""
    model, record = run.model, run.record
    targets = _check_targets(ModelView.of(model), method)
    run.state(RunState)
    with every_token_sparse():
        with record.timed("prepare"):
            linears = tuple(linear for linear in ModelView.of(model).linears if linear.name in targets)
            planning = Planning(model, linears, run.calibration, run.seed, run.directory, record, run.progress)
            prepared = method.prepare(planning)
            del linears, planning  # they keep the replaced layers alive
        with bars.progress(f"converting with {method.name()}", len(targets), shown=run.progress) as advance:
            _replace_all(model, prepared, targets, run.calibration, run.mode, run.seed, record, advance)
    record.metrics["state"] = method.state


def _check_targets(view: ModelView, method: LayerMethod) -> frozenset[str]:
    """Names of the linears to replace, each of which the method accepts."""
    targets = method.targeted(view)
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
