"""Multiply by the columns of a weight whose inputs are large, and by a low-rank copy for the rest, as R-Sparse does.

Which columns count is found for every token, from the inputs alone, in the call that multiplies: W itself is read
only where it counts, so it is stored by columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.gather_matmul import native, triton
from trimtab.kernels.gather_matmul.reference import gather_matmul_reference
from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["GATHER_MATMUL", "MAX_ROWS", "GatherWeight", "gather_matmul"]

MAX_ROWS = native.MAX_ROWS
"""Rows of x that compiled kernels take; with more the columns that any of them wants are soon all."""

_ANY_THRESHOLD = torch.zeros(1)

GATHER_MATMUL = KernelOp(
    "gather_matmul",
    reference=gather_matmul_reference,
    backends=(
        Backend("triton", run=triton.gather_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.gather_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)


def gather_matmul(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """x [..., in] -> W (m * x) + left (right ((1 - m) * x)) [..., out] in x.dtype, m = |x| * scale > threshold.

    x          float32, bfloat16 or float16
    columns    [in, out], the transpose of W, floating and finite
    threshold  compared in float32; a negative one selects every column, infinity none. NaN in x counts as selected
    scale      float32 [in], for example the norms of the columns; None: 1
    left       [out, r], floating, of one dtype with right; None: what does not count is left out
    right      [r, in]

    Each row of x has its own m. Sums are float32, rounded once. Native kernels multiply the low-rank term in the 16-bit
    format of its factors. Raises ConfigError for shapes and dtypes that do not fit each other and a threshold that is
    NaN, KernelUnavailable if the environment demands a backend that cannot run this.
    """
    if threshold != threshold:
        raise ConfigError("the threshold is NaN; give the magnitude above which an input counts.")
    if tuple(x.shape[-1:]) != tuple(columns.shape[:1]):
        raise ConfigError(f"x ends in {list(x.shape[-1:])}, but the columns are {list(columns.shape)}, [in, out].")
    GatherWeight(columns, _ANY_THRESHOLD, scale, left, right).check()
    return GATHER_MATMUL(x, columns, threshold, scale, left, right)
