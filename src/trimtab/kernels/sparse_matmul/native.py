"""The C++ kernels of native/bitmap_matmul.cpp on CPU tensors, through ctypes.

Values are spread to their columns in registers, under the bitmap's bits, and multiplied there as if they were dense, so
that what is read from memory is what is stored. bfloat16 values and inputs are multiplied as they are where the
processor has AVX-512 BF16 and VBMI2; in every other case both are float32. All sums are float32. Rows of x do not
influence each other and neither does the number of threads, up to MAX_ROWS rows; with more the weight is written out
block by block, in the dtype of x, and multiplied by torch, because then arithmetic and not memory is the limit.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.kernels.library import DTYPES, SparseProblem, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

MAX_ROWS = 8
"""Rows of x that one pass over the weight takes."""
BLOCK_WEIGHTS = 1 << 24
"""Weights written out at a time when there are more rows."""


def refuses(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> str | None:
    """Why these arguments need another backend, or None."""
    return refused({"x": x, "bitmap": bitmap, "values": values, "offsets": offsets}, ("x", "values"))


def sparse_matmul_native(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """`sparse_matmul` in C++, on the CPU, for input that `refuses` has no objection to."""
    out_features = bitmap.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if not out.numel():
        return out
    x = x.contiguous()
    rows = x.numel() // in_features
    if rows > MAX_ROWS:
        return _by_blocks(x, bitmap, values, offsets, out)
    status = native_library().tt_sparse_matmul(
        _problem(out_features, in_features, values.dtype, x.dtype, isa_limit()),
        x.data_ptr(),
        bitmap.data_ptr(),
        values.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    check(status)
    return out


def write_out(bitmap: Tensor, values: Tensor, offsets: Tensor, first: int, out: Tensor) -> Tensor:
    """The dense rows from `first` on, as many as `out` [rows, in] has, rounded to its dtype; returns `out`."""
    rows, in_features = out.shape
    status = native_library().tt_sparse_dequantize(
        _problem(bitmap.shape[0], in_features, values.dtype, out.dtype, isa_limit()),
        bitmap.data_ptr(),
        values.data_ptr(),
        offsets.data_ptr(),
        first,
        rows,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return out


@functools.lru_cache(maxsize=4096)
def _problem(
    out_features: int, in_features: int, dtype: torch.dtype, x: torch.dtype, isa: int
) -> ctypes.Array[SparseProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    return (SparseProblem * 1)(SparseProblem(out_features, in_features, DTYPES[dtype], DTYPES[x], isa))


def _by_blocks(x: Tensor, bitmap: Tensor, values: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    in_features, out_features = x.shape[-1], bitmap.shape[0]
    inputs, outputs = x.view(-1, in_features), out.view(-1, out_features)
    step = max(1, BLOCK_WEIGHTS // in_features)
    buffer = torch.empty((min(step, out_features), in_features), dtype=x.dtype)
    for first in range(0, out_features, step):
        part = outputs[:, first : first + step]
        dense = write_out(bitmap, values, offsets, first, buffer[: part.shape[1]])
        torch.mm(inputs, dense.t(), out=part)
    return out
