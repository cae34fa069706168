"""Step 4 of QLLM: train low-rank terms, merged into the weights before rounding, unit of blocks after unit.

A unit's loss is the mean squared difference between its output on the hidden states of the compressed model and the
original unit's output on the original's. Both streams then move through the unit.

Memory beyond the two models: the calls of one unit's blocks on the calibration text, hidden states included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import NumericsError
from trimtab.models.calibration import BlockStream
from trimtab.models.captured_call import CapturedCall
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.frozen import frozen
from trimtab.models.views import BlockView, ModelView
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.reindex import Reindex
from trimtab.tensors.transform import Chain, Transform
from trimtab.weights._tuning import Tuning
from trimtab.weights.base import Notes

if TYPE_CHECKING:
    from trimtab.weights.qllm import Qllm


class CorrectedLinear(nn.Module):
    """y = round(W' + s L R) T(x) + b, with gradients straight through both roundings to L [out, r] and R [r, width].

    `weight` [out, in] is the original; W' is what it becomes behind the channels that `layer` splits and merges.
    """

    def __init__(self, layer: CompressedLinear, weight: Tensor, method: Qllm, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is no submodule
        self.method = method
        steps = _steps(layer.tensor.transform)
        self.wide = next((step.expand(weight) for step in steps if isinstance(step, Reindex)), weight)
        width, rank = self.wide.shape[1], method.rank
        right = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5  # that of a LoRA
        self.right = nn.Parameter(right.to(weight.device))
        self.left = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def corrected(self) -> Tensor:
        """W' + s L R, float32 [out, width]."""
        return self.wide + (self.method.alpha / self.method.rank) * self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        weight = self.corrected()
        rounded = weight + (self.method.grid(weight.detach()).dequantize() - weight).detach()
        for step in _steps(layer.tensor.transform):
            applied = step.apply(x)
            x = x + (applied - x).detach() if isinstance(step, ActivationGrid) else applied
        return nn.functional.linear(x, rounded.to(x.dtype), layer.bias)

    def merged(self) -> CompressedTensor:
        """What is stored: the very rounding that was trained."""
        return replace(self.layer[0].tensor, parts=(self.method.grid(self.corrected().detach()),))


def _steps(transform: Transform | None) -> tuple[Transform, ...]:
    if transform is None:
        return ()
    return transform.steps if isinstance(transform, Chain) else (transform,)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Calls of consecutive blocks, [block][chunk], on the stream in front of the first."""

    calls: Sequence[Sequence[CapturedCall]]

    @classmethod
    def capture(cls, stream: BlockStream, blocks: Sequence[BlockView], sequences: int) -> _Unit:
        return cls([stream.capture(block, block.module, sequences=sequences) for block in blocks])

    def output(self, chunk: int) -> Tensor:
        """The unit's output on one chunk: each block on what the one before it puts out."""
        hidden = self.calls[0][chunk].hidden
        for calls in self.calls:
            hidden = calls[chunk].run(hidden)
        return hidden

    @property
    def chunks(self) -> int:
        return len(self.calls[0])


def correct_errors(method: Qllm, tuning: Tuning) -> Notes:
    """Correct `tuning.model` in place; errors of each unit before and after. Deterministic in the seed."""
    assert tuning.calibration is not None
    calibration = tuning.calibration
    generator = torch.Generator().manual_seed(tuning.seed)
    views = ModelView.of(tuning.model), ModelView.of(tuning.teacher)
    streams = [BlockStream(view, calibration, seed=tuning.seed, chunk_tokens=calibration.length) for view in views]
    starts = range(0, len(views[0].blocks), method.unit_blocks)
    steps = len(starts) * method.epochs * len(calibration.tokens)
    training = tuning.model.training
    tuning.model.train(False)
    notes: Notes = {}
    bar = bars.progress("correcting errors", steps, shown=tuning.progress)
    try:
        with bar as advance:
            for start in starts:
                blocks = [view.blocks[start : start + method.unit_blocks] for view in views]
                before, after = _correct_unit(method, tuning, streams, blocks, generator, advance)
                notes |= {f"unit_{start}_error_before": before, f"unit_{start}_error": after}
                for stream, own in zip(streams, blocks, strict=True):
                    for block in own:
                        stream.advance(block)
    finally:
        tuning.model.train(training)
    return notes


def _correct_unit(
    method: Qllm,
    tuning: Tuning,
    streams: Sequence[BlockStream],
    blocks: Sequence[Sequence[BlockView]],
    generator: torch.Generator,
    advance: Callable[[str], None],
) -> tuple[float, float]:
    assert tuning.calibration is not None
    count, masks = len(tuning.calibration.tokens), tuning.calibration.mask
    student, teacher = (_Unit.capture(s, own, count) for s, own in zip(streams, blocks, strict=True))
    with torch.no_grad():
        targets = [teacher.output(chunk).float() for chunk in range(teacher.chunks)]

    def loss(chunk: int) -> Tensor:
        mask = masks[chunk : chunk + 1].to(targets[chunk].device)
        return (student.output(chunk).float() - targets[chunk])[mask].square().mean()

    @torch.no_grad()
    def mean_loss() -> float:
        return sum(float(loss(chunk)) for chunk in range(student.chunks)) / student.chunks

    before = mean_loss()
    with _corrected(method, tuning, blocks[0], generator) as (layers, norms):
        original = {name: norm.detach().clone() for name, norm in norms.items()}
        parameters = [p for layer in layers.values() for p in layer.parameters()] + list(norms.values())
        optimizer = torch.optim.AdamW(parameters, lr=method.learning_rate, weight_decay=0.0)
        steps = method.epochs * student.chunks
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(method.epochs):
            for chunk in torch.randperm(student.chunks, generator=generator).tolist():
                value = loss(chunk)
                if not bool(torch.isfinite(value)):
                    raise NumericsError(
                        f"correcting {blocks[0][0].name} to {blocks[0][-1].name} diverged. Lower learning_rate "
                        f"({method.learning_rate}), or leave the correction out with rank=0."
                    )
                optimizer.zero_grad()
                torch.autograd.backward(value)
                optimizer.step()
                schedule.step()
                advance(f"{blocks[0][0].name} {float(value.detach()):.3g}")
        after = mean_loss()
        better = after < before
        merged = {name: layer.merged() for name, layer in layers.items()} if better else {}
    for name, tensor in merged.items():
        module = tuning.model.get_submodule(name)
        assert isinstance(module, CompressedLinear)
        module.set_tensor(tensor)
    with torch.no_grad():
        for name, norm in norms.items():
            if better:
                tuning.record.changed_dense.append(name)
            else:
                norm.copy_(original[name])
    return before, after if better else before


def _trained_norms(model: PreTrainedModel, blocks: Sequence[BlockView]) -> dict[str, nn.Parameter]:
    """Name -> parameter of the norms in front of attention and MLP, their gradients switched on.

    In a 16-bit model, changes below its precision are lost.
    """
    norms = {id(part.norm) for block in blocks for part in (block.attention, block.mlp)}
    found = {}
    for name, module in model.named_modules():
        if id(module) in norms:
            for own, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_()
                found[f"{name}.{own}"] = parameter
    return found


@contextlib.contextmanager
def _corrected(
    method: Qllm, tuning: Tuning, blocks: Sequence[BlockView], generator: torch.Generator
) -> Iterator[tuple[dict[str, CorrectedLinear], dict[str, nn.Parameter]]]:
    """Within, the compressed linears of `blocks` are CorrectedLinears, and only they and the norms have gradients."""
    original = {linear.name: linear for linear in ModelView.of(tuning.teacher).linears}
    found = {linear.name: linear for block in blocks for linear in block.linears if linear.compressed is not None}
    with frozen(tuning.model):
        try:
            layers = {}
            for name, linear in found.items():
                assert linear.compressed is not None
                layers[name] = CorrectedLinear(linear.compressed, original[name].weight.float(), method, generator)
                linear.replace(layers[name])
            yield layers, _trained_norms(tuning.model, blocks)
        finally:
            for linear in found.values():
                linear.replace(linear.module)
