"""How much each row and column of a weight matters for the loss: factors of its Fisher information.

The empirical Fisher information of a weight [out, in] is F_ij = mean over examples of (dl/dW_ij)^2, with l the mean
next-token loss of one sequence. Its row means and column means need neither F nor a gradient: with X [tokens, in] the
linear's inputs and D [tokens, out] the gradients of its outputs, the gradient is D^T X, and per example

    sum_j (dl/dW_ij)^2 = d_i^T (X X^T) d_i        sum_i (dl/dW_ij)^2 = x_j^T (D D^T) x_j

d_i, x_j being columns of D and X. Source: Guo, Greengard, Xing, Kim, LQ-LoRA, ICLR 2024, arXiv:2311.12023, which forms
the gradients; the products of Gram matrices give the same numbers.

Memory beyond the model: the inputs of all blocks for one sequence (blocks are run again on the way back), the
activations of one block, the logits of one sequence, and two token x token matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.core.progress import progress as progress_bar
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.frozen import frozen
from trimtab.models.views import LinearView, ModelView

__all__ = ["Fisher", "fisher_information"]


@dataclass(frozen=True, slots=True)
class Fisher:
    """Of one linear, means over examples, float32.

    rows       [out]      mean_j F_ij
    columns    [in]       mean_i F_ij
    full       [out, in]  F, if it was asked for; as large as the weight in float32
    """

    rows: Tensor
    columns: Tensor
    full: Tensor | None = None


def fisher_information(
    model: PreTrainedModel,
    linears: Sequence[LinearView],
    calibration: CalibrationSet,
    *,
    full: bool = False,
    progress: bool = False,
) -> dict[str, Fisher]:
    """Name -> Fisher information of each of `linears`, of the model as it is, one sequence at a time.

    Padding enters neither the loss nor the factors. `full` gathers F as well, for models small enough to hold it. The
    parameters' gradients and flags are left as they were. Raises DataError if a sequence is longer than the model's
    context or if no sequence has two tokens, NumericsError naming the linear if a loss or a factor is NaN or infinite.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and calibration.length > context:
        raise DataError(
            f"sequences of {calibration.length} tokens are longer than the model's context of {context}. Make them "
            f"with length={context} or less."
        )
    sums = {linear.name: _Sums(linear, full) for linear in linears}
    examples = 0
    bar = progress_bar("Fisher information", len(calibration.tokens), shown=progress)
    with _differentiable(model, linears, sums), bar as advance:
        for tokens, mask in zip(calibration.tokens, calibration.mask, strict=True):
            examples += _backward(model, tokens[mask][None])
            advance("")
    if not examples:
        raise DataError("Fisher information needs a sequence of at least two tokens that are not padding.")
    return {name: total.result(examples) for name, total in sums.items()}


class _Sums:
    """What is added up for one linear, in float64."""

    def __init__(self, linear: LinearView, full: bool) -> None:
        self.name = linear.name
        self.shape = (linear.out_features, linear.in_features)
        self.rows = torch.zeros(self.shape[0], dtype=torch.float64)
        self.columns = torch.zeros(self.shape[1], dtype=torch.float64)
        self.full = torch.zeros(self.shape) if full else None

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in one example: X [1, tokens, in] and D [1, tokens, out]."""
        x, d = (t.detach().reshape(-1, t.shape[-1]).float() for t in (inputs, gradients))
        scale = float(d.abs().max())  # gradients of a mean over tokens are small, their fourth powers vanish
        if not scale > 0:
            self._refuse_non_finite(d)
            return
        d = d / scale
        self.rows += (((x @ x.T) @ d) * d).sum(dim=0).double().cpu() * scale**2
        self.columns += (((d @ d.T) @ x) * x).sum(dim=0).double().cpu() * scale**2
        if self.full is not None:
            self.full += ((d.T @ x).square() * scale**2).cpu()

    def result(self, examples: int) -> Fisher:
        out_features, in_features = self.shape
        rows = (self.rows / (examples * in_features)).clamp(min=0)
        columns = (self.columns / (examples * out_features)).clamp(min=0)
        for factor in (rows, columns):
            self._refuse_non_finite(factor)
        return Fisher(rows.float(), columns.float(), None if self.full is None else self.full / examples)

    def _refuse_non_finite(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(
                f"the gradients at {self.name} are NaN or infinite on the calibration text. Check the model's weights, "
                "or load it in a wider dtype (float32)."
            )


class _Watched(torch.autograd.Function):
    """x W^T, which on the way back shows x and the output's gradient to `seen`. The input is a saved tensor, so a
    checkpointed block holds it only while it is run again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seen: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.seen = weight, seen
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        ctx.seen(x, gradient)
        return gradient @ ctx.weight, None, None


@contextlib.contextmanager
def _differentiable(model: PreTrainedModel, linears: Sequence[LinearView], sums: dict[str, _Sums]) -> Iterator[None]:
    """Within: a backward pass through the model fills `sums`, runs blocks again and computes no other gradient."""
    view = ModelView.of(model)
    changed: list[nn.Module] = []
    training = model.training

    def start(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output.requires_grad_(True)  # the one leaf: without it nothing would be differentiated

    handle = view.embedding.register_forward_hook(start)
    try:
        model.train(False)
        for linear in linears:
            linear.module.__dict__["forward"] = _watched(linear, sums[linear.name])
            changed.append(linear.module)
        for block in view.blocks:
            block.module.__dict__["forward"] = _run_twice(block.module.forward)
            changed.append(block.module)
        with frozen(model):
            yield
    finally:
        handle.remove()
        for module in changed:
            module.__dict__.pop("forward", None)
        model.train(training)


def _watched(linear: LinearView, total: _Sums) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        product: Tensor = _Watched.apply(x, linear.weight, total.add)  # type: ignore[no-untyped-call]
        return product if linear.bias is None else product + linear.bias

    return forward


def _run_twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _backward(model: PreTrainedModel, tokens: Tensor) -> int:
    """Forward and backward pass of one sequence [1, tokens]; the number of examples it makes, 1 or 0."""
    if tokens.shape[1] < 2:
        return 0
    tokens = tokens.to(model.device)
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, tokens[0, 1:])
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"the loss of {type(model).__name__} on the calibration text is {float(loss.detach())}. Check its "
                "weights, or load it in a wider dtype (float32)."
            )
        torch.autograd.backward(loss)
    return 1
