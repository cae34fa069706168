"""One backward pass after another through a model, and what it shows of chosen linears on the way.

The loss is the mean next-token loss of one sequence, the model is as it is and in evaluation mode, and no parameter
gets a gradient: what is wanted of a linear y = x W^T, the gradient D^T X, is a product of its inputs X and of the
gradients D of its outputs, which are shown in turn.

Memory beyond the model: the inputs of all blocks from the first one of interest on, for one sequence (blocks are run
again on the way back), the activations of one block, and the logits of one sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.frozen import frozen
from trimtab.models.views import LinearView, ModelView

Seen = Callable[[Tensor, Tensor], None]
"""Called with X [1, tokens, in] and D [1, tokens, out] of one sequence."""


def check_context(model: PreTrainedModel, calibration: CalibrationSet) -> None:
    """Raise DataError if a sequence is longer than the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and calibration.length > context:
        raise DataError(
            f"sequences of {calibration.length} tokens are longer than the model's context of {context}. Make them "
            f"with length={context} or less."
        )


@contextlib.contextmanager
def watched(model: PreTrainedModel, linears: Sequence[tuple[LinearView, Seen]]) -> Iterator[None]:
    """Within, `backward` calls what stands beside each linear; it goes back no further than the first one's block.

    The parameters' gradients and flags, and the model's mode, are as they were afterwards.
    """
    view = ModelView.of(model)
    first = min(linear.block for linear, _ in linears)
    changed: list[nn.Module] = []
    training = model.training

    def start(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments  # the one leaf: without it nothing would be differentiated
        return (hidden.detach().requires_grad_(True), *others)

    handle = view.blocks[first].module.register_forward_pre_hook(start)
    try:
        model.train(False)
        for linear, seen in linears:
            linear.module.__dict__["forward"] = _watched(linear, seen)
            changed.append(linear.module)
        for block in view.blocks[first:]:
            block.module.__dict__["forward"] = _run_twice(block.module.forward)
            changed.append(block.module)
        with frozen(model):
            yield
    finally:
        handle.remove()
        for module in changed:
            module.__dict__.pop("forward", None)
        model.train(training)


def backward(model: PreTrainedModel, tokens: Tensor) -> int:
    """Forward and backward pass of one sequence [1, tokens]; the number of examples it makes, 1 or 0.

    Raises NumericsError if the loss is NaN or infinite, naming the first linear whose input is.
    """
    if tokens.shape[1] < 2:
        return 0
    tokens = tokens.to(model.device)
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, tokens[0, 1:])
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"the loss of {type(model).__name__} on the calibration text is {float(loss.detach())}"
                f"{_first_broken(model, tokens)}. Check its weights, or load it in a wider dtype (float32)."
            )
        torch.autograd.backward(loss)
    return 1


@torch.no_grad()
def _first_broken(model: PreTrainedModel, tokens: Tensor) -> str:
    """The end of a sentence on where NaN or infinity first meets a linear; empty if none does."""
    broken: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not bool(torch.isfinite(arguments[0]).all()):
                broken.append(name)

        return hook

    handles = [x.module.register_forward_pre_hook(look(x.name)) for x in ModelView.of(model).linears]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f": the input of {broken[0]} is the first that is not finite" if broken else ""


class _Watched(torch.autograd.Function):
    """x W^T, which on the way back shows x and the output's gradient to `seen`. The input is a saved tensor, so a
    checkpointed block holds it only while it is run again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seen: Seen) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.seen = weight, seen
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        ctx.seen(x, gradient)
        return gradient @ ctx.weight, None, None


def _watched(linear: LinearView, seen: Seen) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        product: Tensor = _Watched.apply(x, linear.weight, seen)  # type: ignore[no-untyped-call]
        return product if linear.bias is None else product + linear.bias

    return forward


def _run_twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
