"""Multiply by weights stored as packed codes with group scales: `x @ W^T` with `W = scale * (code - zero)`, or with a
level looked up for each code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.grid_matmul import native, triton
from trimtab.kernels.grid_matmul.reference import grid_matmul_reference
from trimtab.kernels.grid_matmul.weight import GridWeight, check_all
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["GRID_MATMUL", "GridWeight", "grid_matmul", "grid_matmul_many"]

GRID_MATMUL = KernelOp(
    "grid_matmul",
    reference=grid_matmul_reference,
    backends=(
        Backend("triton", run=triton.grid_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.grid_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)


def grid_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    levels: Tensor | None = None,
) -> Tensor:
    """x [..., in] -> x @ W^T [..., out] in the dtype of x, float32, bfloat16 or float16; the rest as in GridWeight.

    Sums are float32. An x with NaN or infinity gives rows that are not finite. Native kernels are fastest for groups of
    whole multiples of 32 or one group per row. With bfloat16 inputs, levels may be rounded to bfloat16 once (the native
    kernel does on a processor with AVX-512 BF16), and whole weights may be rounded to the dtype of x if x has more rows
    than the packed product pays for. Raises ConfigError for shapes and dtypes that do not fit each other,
    KernelUnavailable if the environment demands a backend that cannot run this.
    """
    return grid_matmul_many(x, (GridWeight(packed, scales, zeros, bits, group_size, in_features, levels),))[0]


def grid_matmul_many(x: Tensor, weights: Sequence[GridWeight]) -> tuple[Tensor, ...]:
    """The product of x with each weight, all with the in_features of x: what `grid_matmul` gives for each, in one call.

    The native kernel shares out the rows of all weights at once, which saves the start of the threads; its results may
    be views of one tensor. Errors as in `grid_matmul`.
    """
    check_all(weights)
    if x.ndim == 0 or x.shape[-1] != weights[0].in_features:
        raise ConfigError(f"x ends in {list(x.shape[-1:])}, but the weight has in_features={weights[0].in_features}.")
    return GRID_MATMUL(x, weights)
