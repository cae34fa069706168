"""The C++ kernels of native/bitmap_matmul.cpp on CPU tensors, through ctypes.

Values are spread to their columns in registers, under the bitmap's bits, and multiplied there as if they were dense, so
that what is read from memory is what is stored. bfloat16 values and codes are multiplied with bfloat16 inputs as they
are where the processor has AVX-512 BF16 and VBMI2; in every other case both are float32. All sums are float32, those of
codes once for each group. Rows of x do not influence each other and neither does the number of threads, up to MAX_ROWS
rows; with more the weight is written out block by block, in the dtype of x, and multiplied by torch, because then
arithmetic and not memory is the limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.library import DTYPES, SparseWeightStruct, check, isa_limit, native_library
from trimtab.kernels.refusals import refused
from trimtab.kernels.sparse_matmul.weight import SparseWeight

MAX_ROWS = 8
"""Rows of x that one pass over the weight takes."""
BLOCK_WEIGHTS = 1 << 24
"""Weights written out at a time when there are more rows."""
_CODES = 4


def refuses(x: Tensor, weights: Sequence[SparseWeight]) -> str | None:
    """Why these arguments need another backend, or None."""
    for weight in weights:
        floats = ("x",) if weight.scales is not None else ("x", "values")
        if reason := refused({"x": x, **weight.tensors()}, floats):
            return reason
    return None


def sparse_matmul_native(x: Tensor, weights: Sequence[SparseWeight]) -> tuple[Tensor, ...]:
    """`sparse_matmul_many` in C++, on the CPU, for input that `refuses` has no objection to."""
    shape, rows = x.shape[:-1], x.numel() // weights[0].in_features
    x = x.contiguous()
    if rows > MAX_ROWS:
        return tuple(_by_blocks(x, weight) for weight in weights)
    sizes = [weight.out_features for weight in weights]
    out = torch.empty(rows * sum(sizes), dtype=x.dtype)
    if out.numel():
        status = native_library().tt_sparse_matmul(
            (SparseWeightStruct * len(weights))(*map(describe, weights)),
            len(weights),
            x.data_ptr(),
            out.data_ptr(),
            rows,
            DTYPES[x.dtype],
            isa_limit(),
            torch.get_num_threads(),
        )
        check(status)
    parts = out.split_with_sizes([rows * size for size in sizes])
    return tuple(part.view(*shape, size) for part, size in zip(parts, sizes, strict=True))


def describe(weight: SparseWeight) -> SparseWeightStruct:
    """What the library reads of a weight. It points into the weight's tensors, which must outlive it."""
    return SparseWeightStruct(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bitmap.data_ptr(),
        weight.values.data_ptr(),
        weight.offsets.data_ptr(),
        None if weight.scales is None else weight.scales.data_ptr(),
        DTYPES[weight.values.dtype] if weight.scales is None else _CODES,
    )


def write_out(weight: SparseWeight, first: int, out: Tensor) -> Tensor:
    """The dense rows from `first` on, as many as `out` [rows, in] has, rounded to its dtype; returns `out`."""
    status = native_library().tt_sparse_dequantize(
        ctypes.byref(describe(weight)), first, len(out), out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads()
    )
    check(status)
    return out


def _by_blocks(x: Tensor, weight: SparseWeight) -> Tensor:
    in_features, out_features = weight.in_features, weight.out_features
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    inputs, outputs = x.view(-1, in_features), out.view(-1, out_features)
    step = max(1, BLOCK_WEIGHTS // in_features)
    buffer = torch.empty((min(step, out_features), in_features), dtype=x.dtype)
    for first in range(0, out_features, step):
        part = outputs[:, first : first + step]
        torch.mm(inputs, write_out(weight, first, buffer[: part.shape[1]]).t(), out=part)
    return out
