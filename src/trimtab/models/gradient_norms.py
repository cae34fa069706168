"""How large the gradient of each weight is on calibration text: a norm over sequences, entry by entry.

For a weight [out, in] and sequences s with mean next-token losses l_s,

    order 1    sum_s |dl_s/dW_ij|               order 2    sqrt(sum_s (dl_s/dW_ij)^2)

Every sequence is a backward pass of its own: gradients of several sequences added with their signs would cancel.
Source: Das, Sun, Ma, Shen, GBLM-Pruner, arXiv:2311.04902, whose code does the same.

Memory beyond that of a backward pass (`models/backward.py`): the float32 sums of the linears of one *pass*, at most
`memory` bytes, and the results, 2 bytes per weight on the processor. What does not fit into one pass is gathered in
several, each of which runs the text again, back to its own first block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.core.progress import progress as progress_bar
from trimtab.models.backward import backward, check_context, watched
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import LinearView

__all__ = ["gradient_norms"]


def gradient_norms(
    model: PreTrainedModel,
    linears: Sequence[LinearView],
    calibration: CalibrationSet,
    *,
    order: Literal[1, 2] = 1,
    scale: float = 1.0,
    memory: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Name -> norm [out, in] over sequences of each of `linears`, times `scale`, of the model as it is.

    Norms are rounded to bfloat16, on the CPU.

    memory    bytes of sums that are held at once (None: of all linears); one linear is always taken

    Padding enters no loss. The parameters' gradients and flags are left as they were. Raises DataError if a sequence is
    longer than the model's context or if no sequence has two tokens, NumericsError naming the linear if a loss or a sum
    is NaN or infinite.
    """
    check_context(model, calibration)
    passes = list(_passes(linears, memory))
    found: dict[str, Tensor] = {}
    bar = progress_bar("gradients", len(passes) * len(calibration.tokens), shown=progress)
    with bar as advance:
        for members in passes:
            sums = [_Sum(linear, order) for linear in members]
            examples = 0
            with watched(model, [(own.linear, own.add) for own in sums]):
                for tokens, mask in zip(calibration.tokens, calibration.mask, strict=True):
                    examples += backward(model, tokens[mask][None])
                    advance("")
            if not examples:
                raise DataError("gradients need a sequence of at least two tokens that are not padding.")
            found |= {own.linear.name: own.result(scale) for own in sums}
    return found


def _passes(linears: Sequence[LinearView], memory: int | None) -> Iterator[list[LinearView]]:
    """The linears in order, cut where their sums would take more than `memory`."""
    members: list[LinearView] = []
    held = 0
    for linear in linears:
        nbytes = 4 * linear.out_features * linear.in_features
        if members and memory is not None and held + nbytes > memory:
            yield members
            members, held = [], 0
        members.append(linear)
        held += nbytes
    yield members


class _Sum:
    """What is added up for one linear."""

    def __init__(self, linear: LinearView, order: Literal[1, 2]) -> None:
        self.linear, self.order = linear, order
        self.total: Tensor | None = None

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        x, d = (t.detach().reshape(-1, t.shape[-1]).float() for t in (inputs, gradients))
        gradient = d.T @ x
        term = gradient.abs_() if self.order == 1 else gradient.square_()
        self.total = term if self.total is None else self.total.add_(term)

    def result(self, scale: float) -> Tensor:
        assert self.total is not None
        total = self.total if self.order == 1 else self.total.sqrt()
        if not bool(torch.isfinite(total).all()):
            raise NumericsError(
                f"the gradients at {self.linear.name} are NaN or infinite on the calibration text. Check the model's "
                "weights, or load it in a wider dtype (float32)."
            )
        return (total * scale).to(torch.bfloat16).cpu()
