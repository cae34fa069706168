"""Compress the linear layers of a model in place: what is the same for every method of this room."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import CompositionError
from trimtab.core.run_record import RunRecord
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.compression import Run
from trimtab.models.conversion import check_weight
from trimtab.models.info import info_of
from trimtab.models.narrow import settle_widths
from trimtab.models.planning import Planning
from trimtab.models.views import ModelView
from trimtab.tensors.metric import Metric
from trimtab.weights._loop import BlockLoop
from trimtab.weights._pruning.plan import RECORDED, Plan
from trimtab.weights._state import State
from trimtab.weights._tuning import Tuning
from trimtab.weights.base import SliceMethod, WeightMethod


def apply(method: WeightMethod, run: Run) -> None:
    """See `ModelMethod.apply`.

    For each linear that is compressed the record has the method's notes, `relative_weight_error` |W~ - W|^2 / |W|^2
    and, if the Gram matrix was gathered, `relative_error` tr((W~ - W) H (W~ - W)^T) / tr(W H W^T).
    """
    model, record = run.model, run.record
    targets = _check_targets(ModelView.of(model), method)
    state = run.state(State)
    with record.timed("prepare"):
        linears = tuple(linear for linear in ModelView.of(model).linears if linear.name in targets)
        planning = Planning(model, linears, run.calibration, run.seed, run.directory, record, run.progress)
        prepared = method.prepare(planning)
        del linears, planning  # they keep the replaced layers alive
    teacher = _frozen_copy(model) if prepared.tunes else None
    with bars.progress(f"compressing with {method.name()}", len(targets), shown=run.progress) as advance:
        seen = None if run.calibration is None else prepared.statistics_text(run.calibration)
        BlockLoop(model, prepared, targets, seen, run.mode, run.seed, state, record).run(advance)
    if teacher is not None:
        with record.timed("tune"):
            tuning = Tuning(model, teacher, run.calibration, run.seed, record, run.progress)
            record.metrics["tuning"] = prepared.tune(tuning)
        _measure_again(model, teacher, record)
    if isinstance(method, SliceMethod):
        settle_widths(model)
        if (earlier := info_of(model).record) is not None:
            first, then = (Plan.of_rows(done.metrics.get(RECORDED, ())) for done in (earlier, record))
            record.metrics[RECORDED] = first.followed_by(then).rows()


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
