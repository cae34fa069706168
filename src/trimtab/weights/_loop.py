"""The walk over a model's blocks that gathers statistics, compresses and replaces, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.core.run_record import RunRecord
from trimtab.models.calibration import BlockStream, CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.model_method import Mode
from trimtab.models.narrow import narrow_heads, narrow_linear
from trimtab.models.statistics import Stats
from trimtab.models.views import BlockView, LinearView, ModelView
from trimtab.tensors.metric import Metric
from trimtab.weights._block_run import BlockRun
from trimtab.weights._pruning.plan import RECORDED, Plan
from trimtab.weights._state import State
from trimtab.weights.base import (
    BlockMethod,
    Compressed,
    CompressedBlock,
    LinearMethod,
    SlicedBlock,
    SliceMethod,
    WeightMethod,
)

Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BlockLoop:
    """One compression run.

    targets        names of the linears to compress
    calibration    None exactly if the method needs no statistics
    state          where finished blocks are kept, and taken from
    """

    model: PreTrainedModel
    method: WeightMethod
    targets: frozenset[str]
    calibration: CalibrationSet | None
    mode: Mode
    seed: int
    state: State | None
    record: RunRecord

    @torch.no_grad()
    def run(self, advance: Advance) -> None:
        """Replace all targets; calls `advance(name)` after each."""
        view = ModelView.of(self.model)
        to_do = [block.index for block in view.blocks if self._targeted(block.linears)]
        finished = [index for index in to_do if self.state and self.state.has_block(index)]
        self.record.metrics["resumed_blocks"] = len(finished)
        last = max(set(to_do) - set(finished), default=-1)  # beyond it no statistics are wanted
        stream = BlockStream(view, self.calibration, seed=self.seed) if self.calibration and last >= 0 else None
        count = len(view.blocks)
        del view  # it keeps the replaced layers alive
        for index in range(count):
            block = ModelView.of(self.model).blocks[index]
            through = stream if stream and index < last else None
            if index in finished:
                self._take_finished(block, through, advance)
            elif isinstance(self.method, SliceMethod):
                self._slice(self.method, block, stream, through, advance)
            elif isinstance(self.method, BlockMethod):
                self._compress_together(self.method, block, stream, through, advance)
            elif self.mode == "dense":
                self._compress_dense(block, stream, through, advance)
            else:
                self._compress_sequential(block, stream, through, advance)

    def _take_finished(self, block: BlockView, through: BlockStream | None, advance: Advance) -> None:
        assert self.state
        done: CompressedBlock | SlicedBlock = self.state.load_block(block.index)
        if self.mode == "dense":
            self._advance(through, block)  # the others are to see the original block's output
        self._install_all(block, done, advance)
        if self.mode == "sequential":
            self._advance(through, block)

    def _compress_together(
        self,
        method: BlockMethod,
        block: BlockView,
        stream: BlockStream | None,
        through: BlockStream | None,
        advance: Advance,
    ) -> None:
        assert stream is not None, f"{method.name()} is a BlockMethod, which always reads text"
        linears = self._targeted(block.linears)
        weights = {linear.name: linear.weight.clone() for linear in linears}  # a method may fold scales into them
        run = BlockRun(ModelView.of(self.model), block, stream, self.seed)
        stats = self._gather(stream, block, linears)
        with self.record.timed("solve"):
            made = method.compress_block(block, linears, stats, run)
        noted = {linear.name: _with_errors(made.linears[linear.name], weights[linear.name], None) for linear in linears}
        done = CompressedBlock(noted, made.dense)
        if self.mode == "dense":
            self._advance(through, block)
        self._install_all(block, done, advance)
        self._save(block, done)
        if self.mode == "sequential":
            self._advance(through, block)

    def _slice(
        self,
        method: SliceMethod,
        block: BlockView,
        stream: BlockStream | None,
        through: BlockStream | None,
        advance: Advance,
    ) -> None:
        linears = self._targeted(block.linears)
        stats = self._gather(stream, block, linears, advance=self.mode == "dense" and through is not None)
        if linears:
            with self.record.timed("solve"):
                done = method.slice_block(block, linears, stats)
            self._install_all(block, done, advance)
            self._save(block, done)
        if self.mode == "sequential":
            self._advance(through, block)

    def _compress_dense(
        self, block: BlockView, stream: BlockStream | None, through: BlockStream | None, advance: Advance
    ) -> None:
        linears = self._targeted(block.linears)
        stats = self._gather(stream, block, linears, advance=through is not None)
        done = CompressedBlock({linear.name: self._compress(linear, stats.get(linear.site)) for linear in linears})
        self._install_all(block, done, advance)
        self._save(block, done)

    def _compress_sequential(
        self, block: BlockView, stream: BlockStream | None, through: BlockStream | None, advance: Advance
    ) -> None:
        done: dict[str, Compressed] = {}
        for members in block.sites.values():
            linears = self._targeted(members)
            stats = self._gather(stream, block, linears)
            for linear in linears:
                done[linear.name] = self._compress(linear, stats.get(linear.site))
                self._install(linear, done[linear.name], advance)
        self._save(block, CompressedBlock(done))
        self._advance(through, block)

    def _targeted(self, linears: Sequence[LinearView]) -> list[LinearView]:
        return [linear for linear in linears if linear.name in self.targets]

    def _gather(
        self, stream: BlockStream | None, block: BlockView, linears: Sequence[LinearView], *, advance: bool = False
    ) -> dict[str, Stats]:
        if stream is None:
            return {}
        with self.record.timed("calibration"):
            return stream.gather(block, {linear.site: self.method.needs for linear in linears}, advance=advance)

    def _advance(self, stream: BlockStream | None, block: BlockView) -> None:
        if stream is not None:
            with self.record.timed("calibration"):
                stream.advance(block)

    def _compress(self, linear: LinearView, stats: Stats | None) -> Compressed:
        assert isinstance(self.method, LinearMethod)
        with self.record.timed("solve"):
            tensor, notes = self.method.compress(linear, stats)
        return _with_errors(Compressed(tensor, notes), linear.weight, stats)

    def _install_all(self, block: BlockView, done: CompressedBlock | SlicedBlock, advance: Advance) -> None:
        if isinstance(done, SlicedBlock):
            self._install_sliced(block, done, advance)
            return
        for linear in self._targeted(block.linears):
            self._install(linear, done.linears[linear.name], advance)
        for name, values in done.dense.items():
            parameter = self.model.get_parameter(name)
            parameter.data.copy_(values)
            self.record.changed_dense.append(name)

    def _install_sliced(self, block: BlockView, done: SlicedBlock, advance: Advance) -> None:
        for linear in self._targeted(block.linears):
            if (narrow := done.linears.get(linear.name)) is not None:
                module = narrow_linear(linear.module, narrow.weight, narrow.bias)
                linear.replace(module)
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                nbytes = weight.numel() * weight.element_size()
                self.record.changed.append(_entry(linear, narrow.weight.shape, nbytes, narrow.notes))
            advance(linear.name)
        if done.heads is not None:
            narrow_heads(block.attention.module, done.heads)
        if done.plan:
            self.record.metrics.setdefault(RECORDED, []).extend(Plan(done.plan).rows())

    def _install(self, linear: LinearView, done: Compressed, advance: Advance) -> None:
        bias = linear.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        module = CompressedLinear(done.tensor, bias).to(linear.weight.device).train(linear.module.training)
        linear.replace(module)
        self.record.changed.append(_entry(linear, done.tensor.shape, done.tensor.nbytes, done.notes))
        advance(linear.name)

    def _save(self, block: BlockView, done: CompressedBlock | SlicedBlock) -> None:
        if self.state and done.linears:
            self.state.save_block(block.index, done)


def _with_errors(done: Compressed, weight: torch.Tensor, stats: Stats | None) -> Compressed:
    """`done` with the errors that are reported of every linear."""
    result = done.tensor.dequantize()
    errors = {"relative_weight_error": Metric.identity().relative_error(weight, result)}
    if stats is not None and stats.gram is not None:
        metric = Metric.gram(stats.gram.to(weight.device), name=stats.site)
        errors["relative_error"] = metric.relative_error(weight, result)
    return Compressed(done.tensor, {**errors, **done.notes})


def _entry(linear: LinearView, shape: Sequence[int], nbytes: int, notes: Mapping[str, float | str]) -> dict[str, Any]:
    return {"linear": linear.name, "role": linear.role, "shape": list(shape), "nbytes": nbytes, **notes}
