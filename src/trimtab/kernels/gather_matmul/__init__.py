"""Multiply by the columns of a weight whose inputs are large, and by a low-rank copy for the rest, as R-Sparse does.

Which columns count is found for every token, from the inputs alone, in the call that multiplies: W itself is read
only where it counts, so it is stored by columns.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.gather_matmul import native, triton
from trimtab.kernels.gather_matmul.reference import gather_matmul_reference
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["GATHER_MATMUL", "MAX_ROWS", "gather_matmul"]

MAX_ROWS = native.MAX_ROWS
"""Rows of x that compiled kernels take; with more the columns that any of them wants are soon all."""

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
    _check(
        x.shape[-1:],
        columns.shape,
        columns.dtype,
        None if scale is None else (scale.shape, scale.dtype),
        None if left is None else (left.shape, left.dtype),
        None if right is None else (right.shape, right.dtype),
    )
    return GATHER_MATMUL(x, columns, threshold, scale, left, right)


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    columns: torch.Size,
    dtype: torch.dtype,
    scale: tuple[torch.Size, torch.dtype] | None,
    left: tuple[torch.Size, torch.dtype] | None,
    right: tuple[torch.Size, torch.dtype] | None,
) -> None:
    if len(columns) != 2 or not dtype.is_floating_point:
        raise ConfigError(f"columns are {dtype} {list(columns)}; they are floating-point numbers [in, out].")
    if tuple(last) != (columns[0],):
        raise ConfigError(f"x ends in {list(last)}, but the columns are {list(columns)}, [in, out].")
    if scale is not None and (tuple(scale[0]) != (columns[0],) or scale[1] != torch.float32):
        raise ConfigError(f"scale is {scale[1]} {list(scale[0])}; {columns[0]} inputs take float32 [{columns[0]}].")
    if (left is None) != (right is None):
        raise ConfigError("a low-rank term has two factors; give both left and right, or neither.")
    if left is None or right is None:
        return
    fits = len(left[0]) == len(right[0]) == 2 and left[0] == (columns[1], right[0][0]) and right[0][1] == columns[0]
    if not fits or left[1] != right[1] or not left[1].is_floating_point:
        raise ConfigError(
            f"left is {left[1]} {list(left[0])} and right {right[1]} {list(right[0])}; columns {list(columns)} take "
            f"floating [{columns[1]}, r] and [r, {columns[0]}] of one dtype."
        )
