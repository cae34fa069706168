"""The C++ kernels of native/ on CPU tensors, through ctypes.

bfloat16 inputs are multiplied as they are where the processor has AVX-512 BF16: up to 12 rows by codes, which are
exact, or levels, rounded to bfloat16; from 13 to MAX_ROWS rows by weights rounded to bfloat16, a few at a time, in the
cache. In every other case inputs and weights are float32, the weights rounded once as in the reference. All sums are
float32. Rows of a batch do not influence each other, except that their number chooses between these ways, and neither
does the number of threads. With more than MAX_ROWS rows the weight is written out block by block, in the dtype of x,
and multiplied by torch, because then arithmetic and not memory is the limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.library import DTYPES, ZERO_DTYPES, GridWeightStruct, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

MAX_ROWS = 64
"""Rows of x up to which the library multiplies; with more, torch does."""
BLOCK_WEIGHTS = 1 << 24
"""Weights written out at a time when there are more rows: torch's product prefers them over cache-sized blocks."""


def refuses(x: Tensor, weights: Sequence[GridWeight]) -> str | None:
    """Why these arguments need another backend, or None."""
    for weight in weights:
        # not `weight.tensors()`: leaving out what is not there takes time, and this is asked for every product
        named = {"packed": weight.packed, "scales": weight.scales, "zeros": weight.zeros, "levels": weight.levels}
        if reason := refused({"x": x, **named}, ("x", "scales")):
            return reason
    return None


def grid_matmul_native(x: Tensor, weights: Sequence[GridWeight]) -> tuple[Tensor, ...]:
    """`grid_matmul_many` in C++, on the CPU, for input that `refuses` has no objection to."""
    shape, in_features = x.shape[:-1], weights[0].in_features
    rows = x.numel() // in_features
    x = x.contiguous()
    if rows > MAX_ROWS:
        return tuple(_by_blocks(x, weight) for weight in weights)
    sizes = [weight.out_features for weight in weights]
    out = torch.empty(rows * sum(sizes), dtype=x.dtype)
    if out.numel():
        status = native_library().tt_grid_matmul(
            (GridWeightStruct * len(weights))(*map(describe, weights)),
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


def dequantize_native(weight: GridWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in]: float32 arithmetic, then rounded to `dtype` (float32, float16, bfloat16)."""
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype)
    _write_out(describe(weight), 0, out)
    return out


def describe(weight: GridWeight) -> GridWeightStruct:
    """What the library reads of a weight. It points into the weight's tensors, which must outlive it."""
    zeros, levels = weight.zeros, weight.levels
    return GridWeightStruct(
        weight.out_features,
        weight.in_features,
        weight.in_features if weight.group_size == -1 else weight.group_size,
        weight.packed.data_ptr(),
        weight.scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if levels is None else levels.data_ptr(),
        2**weight.bits if levels is not None and levels.ndim == 2 else 0,
        weight.bits,
        DTYPES[weight.scales.dtype],
        0 if zeros is None else ZERO_DTYPES[zeros.dtype],
    )


def _write_out(weight: GridWeightStruct, first: int, out: Tensor) -> None:
    """Rows of a weight from `first` on, as many as `out` has."""
    status = native_library().tt_grid_dequantize(
        ctypes.byref(weight),
        first,
        out.shape[0],
        out.data_ptr(),
        DTYPES[out.dtype],
        isa_limit(),
        torch.get_num_threads(),
    )
    check(status)


def _by_blocks(x: Tensor, weight: GridWeight) -> Tensor:
    rows, in_features, out_features = x.numel() // weight.in_features, weight.in_features, weight.out_features
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    inputs, outputs, described = x.view(rows, in_features), out.view(rows, out_features), describe(weight)
    step = max(1, BLOCK_WEIGHTS // in_features)
    buffer = torch.empty((min(step, out_features), in_features), dtype=x.dtype)
    for start in range(0, out_features, step):
        part = outputs[:, start : start + step]
        block = buffer[: part.shape[1]]
        _write_out(described, start, block)
        torch.mm(inputs, block.t(), out=part)
    return out
