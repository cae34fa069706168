"""The C++ kernels of native/gather_matmul.cpp on CPU tensors, through ctypes, for few rows of x.

One pass over x chooses the columns; those that any row wants are added to the sums of all rows, times the row's input
or zero. The low-rank term multiplies in the 16-bit format of its factors, as kernels/terms does. All sums are float32.
Rows of x do not influence each other and neither does the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.library import DTYPES, GatherWeightStruct, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

MAX_ROWS = 8
_HALVES = (torch.bfloat16, torch.float16)


def refuses(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> str | None:
    """Why these arguments need another way, or None."""
    if x.shape.numel() > MAX_ROWS * columns.shape[0]:
        return f"x of shape {list(x.shape)} has more than {MAX_ROWS} rows"
    if left is not None and left.dtype not in _HALVES:
        return f"factors are {left.dtype}; this kernel is for bfloat16 and float16"
    return refused({"x": x, "columns": columns, "scale": scale, "left": left, "right": right}, ("x", "columns"))


def gather_matmul_native(
    x: Tensor,
    columns: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`gather_matmul` in C++, on the CPU, for input that `refuses` has no objection to."""
    in_features, out_features = columns.shape
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if not out.numel():
        return out
    if not in_features:
        return out.zero_()
    x = x.contiguous()
    weight = GatherWeight(columns, torch.tensor([threshold]), scale, left, right)
    status = native_library().tt_gather_matmul(
        ctypes.byref(describe(weight)),
        1,
        x.data_ptr(),
        out.data_ptr(),
        x.numel() // in_features,
        DTYPES[x.dtype],
        isa_limit(),
        torch.get_num_threads(),
    )
    check(status)
    return out


def describe(weight: GatherWeight) -> GatherWeightStruct:
    """What the library reads of a weight. It points into the weight's tensors, which must outlive it."""
    return GatherWeightStruct(
        weight.out_features,
        weight.in_features,
        0 if weight.right is None else weight.right.shape[0],
        weight.columns.data_ptr(),
        weight.threshold.data_ptr(),
        None if weight.scale is None else weight.scale.data_ptr(),
        None if weight.right is None else weight.right.data_ptr(),
        None if weight.left is None else weight.left.data_ptr(),
        DTYPES[weight.columns.dtype],
        0 if weight.right is None else DTYPES[weight.right.dtype],
    )
