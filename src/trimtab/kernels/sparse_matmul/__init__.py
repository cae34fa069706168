"""Multiply by a weight of which entries are left out, stored as a bitmap of what is kept and the kept values.

At 50 % of 16-bit values this is 0.56 of the dense bytes, to read and to store. A 2:4 pattern takes the same bytes this
way as with two-bit positions (one bit per column either way), and needs no kernel of its own on processors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.op import Backend, KernelOp
from trimtab.kernels.sparse_matmul import native, triton
from trimtab.kernels.sparse_matmul.bitmap import words
from trimtab.kernels.sparse_matmul.reference import sparse_matmul_reference

__all__ = ["SPARSE_MATMUL", "sparse_matmul"]

SPARSE_MATMUL = KernelOp(
    "sparse_matmul",
    reference=sparse_matmul_reference,
    backends=(
        Backend("triton", run=triton.sparse_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.sparse_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)


def sparse_matmul(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """x [..., in] -> x @ W^T [..., out] in x.dtype, W zero but for what is kept.

    x          float32, bfloat16 or float16
    bitmap     int64 [out, words(in)], the layout of bitmap.py
    values     [n] float32, bfloat16 or float16; row after row, columns ascending
    offsets    int32 [out + 1]; row i owns values[offsets[i] : offsets[i + 1]]

    Sums are float32. What is left out is multiplied as the zero it is, so an x with NaN or infinity gives rows that are
    not finite. Values and inputs of bfloat16 may be taken as zero if they are subnormal (the native kernel does on a
    processor with AVX-512 BF16). That bitmap and offsets agree is not checked: a checkpoint's are when it is loaded.
    Raises ConfigError for shapes and dtypes that do not fit each other, KernelUnavailable if the environment demands a
    backend that cannot run this.
    """
    _check(
        x.shape[-1:],
        bitmap.shape,
        bitmap.dtype,
        values.shape,
        values.dtype,
        offsets.shape,
        offsets.dtype,
        in_features,
    )
    return SPARSE_MATMUL(x, bitmap, values, offsets, in_features)


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    bitmap: torch.Size,
    bitmap_dtype: torch.dtype,
    values: torch.Size,
    values_dtype: torch.dtype,
    offsets: torch.Size,
    offsets_dtype: torch.dtype,
    in_features: int,
) -> None:
    if tuple(last) != (in_features,) or in_features < 1:
        raise ConfigError(f"x ends in {list(last)}, but the weight has in_features={in_features}.")
    if len(bitmap) != 2 or bitmap[1] != words(in_features) or bitmap_dtype != torch.int64:
        raise ConfigError(
            f"the bitmap is {bitmap_dtype} {list(bitmap)}; {in_features} inputs take int64 [out, {words(in_features)}]."
        )
    if len(values) != 1 or not values_dtype.is_floating_point:
        raise ConfigError(f"values are {values_dtype} {list(values)}; they are a vector of floating-point numbers.")
    if tuple(offsets) != (bitmap[0] + 1,) or offsets_dtype != torch.int32:
        raise ConfigError(
            f"offsets are {offsets_dtype} {list(offsets)}; {bitmap[0]} rows take int32 [{bitmap[0] + 1}]."
        )
