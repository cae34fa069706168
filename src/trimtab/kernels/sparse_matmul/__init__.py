"""Multiply by weights of which entries are left out, stored as a bitmap of what is kept and the kept values.

At 50 % of 16-bit values this is 0.56 of the dense bytes, to read and to store; with 4-bit codes for values it is 3.25
bits per weight in groups of 64. A 2:4 pattern takes the same bytes this way as with two-bit positions (one bit per
column either way), and needs no kernel of its own on processors.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.op import Backend, KernelOp
from trimtab.kernels.sparse_matmul import native, triton
from trimtab.kernels.sparse_matmul.reference import sparse_matmul_reference
from trimtab.kernels.sparse_matmul.weight import SparseWeight, check_all

__all__ = ["SPARSE_MATMUL", "SparseWeight", "sparse_matmul", "sparse_matmul_many"]

SPARSE_MATMUL = KernelOp(
    "sparse_matmul",
    reference=sparse_matmul_reference,
    backends=(
        Backend("triton", run=triton.sparse_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.sparse_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)


def sparse_matmul(x: Tensor, weight: SparseWeight) -> Tensor:
    """x [..., in] float32, bfloat16 or float16 -> x @ W^T [..., out] in x.dtype.

    Sums are float32. What is left out is multiplied as the zero it is, so an x with NaN or infinity gives rows that are
    not finite. Values and inputs of bfloat16 may be taken as zero if they are subnormal (the native kernel does on a
    processor with AVX-512 BF16). Raises ConfigError for shapes and dtypes that do not fit each other, KernelUnavailable
    if the environment demands a backend that cannot run this.
    """
    return sparse_matmul_many(x, (weight,))[0]


def sparse_matmul_many(x: Tensor, weights: Sequence[SparseWeight]) -> tuple[Tensor, ...]:
    """The product of x with each weight, all with the in_features of x: what `sparse_matmul` gives for each, in one
    call, which saves the start of the native kernel's threads. Errors as in `sparse_matmul`."""
    check_all(weights)
    if x.ndim == 0 or x.shape[-1] != weights[0].in_features:
        raise ConfigError(f"x ends in {list(x.shape[-1:])}, but the weight has in_features={weights[0].in_features}.")
    return SPARSE_MATMUL(x, weights)
