"""What a compressed product has added to it while decoding: a low-rank term and a sparse one, in place.

There is no Triton version: on a GPU the references are two thin products and a gather, which torch does well.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.op import Backend, KernelOp
from trimtab.kernels.terms import native
from trimtab.kernels.terms.reference import low_rank_add_reference, sparse_add_reference

__all__ = ["FEW_ROWS", "LOW_RANK_ADD", "SPARSE_ADD", "low_rank_add", "sparse_add"]

FEW_ROWS = native.MAX_ROWS
"""Rows of x up to which these are worth calling; with more, torch's products are as good."""

LOW_RANK_ADD = KernelOp(
    "low_rank_add",
    reference=low_rank_add_reference,
    backends=(
        Backend("native", run=native.low_rank_add_native, absent=library.absent, refuses=native.low_rank_refuses),
    ),
)
SPARSE_ADD = KernelOp(
    "sparse_add",
    reference=sparse_add_reference,
    backends=(Backend("native", run=native.sparse_add_native, absent=library.absent, refuses=native.sparse_refuses),),
)


def low_rank_add(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out [..., out] + (x [..., in] right^T) left^T; `out` may be overwritten, use what is returned.

    left     [out, r], floating, of one dtype with right
    right    [r, in]

    Sums are float32 and rounded once. Raises ConfigError for shapes that do not fit each other.
    """
    if left.shape[1] != right.shape[0] or right.shape[1] != x.shape[-1] or out.shape[-1] != left.shape[0]:
        raise ConfigError(
            f"x {list(x.shape)} and factors {list(left.shape)}, {list(right.shape)} do not give {list(out.shape)}."
        )
    return LOW_RANK_ADD(out, x, left, right)


def sparse_add(out: Tensor, x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """out [..., out] + x [..., in] S^T; `out` may be overwritten, use what is returned.

    values     [n] floating, row after row
    columns    int32 [n], below in
    offsets    int32 [out + 1]

    Sums are float32 and rounded once. Raises ConfigError for shapes that do not fit each other. Columns and offsets are
    not checked: a checkpoint's are when it is loaded.
    """
    if offsets.shape[0] - 1 != out.shape[-1] or values.shape != columns.shape or out.shape[:-1] != x.shape[:-1]:
        raise ConfigError(
            f"values {list(values.shape)}, columns {list(columns.shape)} and offsets {list(offsets.shape)} do not take "
            f"x {list(x.shape)} to {list(out.shape)}."
        )
    return SPARSE_ADD(out, x, values, columns, offsets)
