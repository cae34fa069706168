"""How much each row and column of a weight matters for the loss: factors of its Fisher information.

The empirical Fisher information of a weight [out, in] is F_ij = mean over examples of (dl/dW_ij)^2, with l the mean
next-token loss of one sequence. Its row means and column means need neither F nor a gradient: with X [tokens, in] the
linear's inputs and D [tokens, out] the gradients of its outputs, the gradient is D^T X, and per example

    sum_j (dl/dW_ij)^2 = d_i^T (X X^T) d_i        sum_i (dl/dW_ij)^2 = x_j^T (D D^T) x_j

d_i, x_j being columns of D and X. Source: Guo, Greengard, Xing, Kim, LQ-LoRA, ICLR 2024, arXiv:2311.12023, which forms
the gradients; the products of Gram matrices give the same numbers.

Memory beyond that of a backward pass (`models/backward.py`): two token x token matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.core.progress import progress as progress_bar
from trimtab.models.backward import backward, check_context, watched
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import LinearView

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
    check_context(model, calibration)
    sums = {linear.name: _Sums(linear, full) for linear in linears}
    examples = 0
    bar = progress_bar("Fisher information", len(calibration.tokens), shown=progress)
    with watched(model, [(linear, sums[linear.name].add) for linear in linears]), bar as advance:
        for tokens, mask in zip(calibration.tokens, calibration.mask, strict=True):
            examples += backward(model, tokens[mask][None])
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
