"""The C++ kernels of native/int_matmul.cpp on CPU tensors, through ctypes.

Rounding of x, gathering and the products are one call. Products of bytes are added by fours where the processor has
AVX-512 VNNI, else by twos. Results are those of the reference to the last bit, whatever the instruction set, the number
of threads and the other rows of x. Any number of rows runs here: codes are unpacked in registers, for eight rows at a
time.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels.int_matmul.reference import check_index
from trimtab.kernels.library import DTYPES, IntProblem, isa_limit, native_library

_FAILURES = {1: "no instruction set it was built for is here", 2: "memory ran out"}
_BAD_INDEX = 5


def refuses(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = {"x": x, "packed": packed, "weight_scales": weight_scales, "index": index, "row_sums": row_sums}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, native kernels read CPU memory"
        if name != "x" and not tensor.is_contiguous():
            return f"{name} of shape {list(tensor.shape)} is not contiguous"
    if x.dtype not in DTYPES or weight_scales.dtype not in DTYPES:
        return (
            f"x is {x.dtype} and weight_scales are {weight_scales.dtype}; "
            "native kernels take float32, float16 and bfloat16"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight_scales.requires_grad):
        return "a gradient is wanted, which only the reference has"
    return None


def int_matmul_native(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """`int_matmul` in C++, on the CPU, for input that `refuses` has no objection to."""
    out_features, width = packed.shape[0], x.shape[-1]
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if not out.numel():
        return out
    x = x.contiguous()
    problem = _problem(
        out_features,
        in_features,
        width,
        bits,
        x_bits,
        x.dtype,
        weight_scales.dtype,
        x_symmetric,
        0 if index is None else index.element_size(),
        isa_limit(),
    )
    status = native_library().tt_int_matmul(
        problem,
        x.data_ptr(),
        packed.data_ptr(),
        weight_scales.data_ptr(),
        None if index is None else index.data_ptr(),
        None if row_sums is None else row_sums.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        0.0 if x_scale is None else x_scale,
        torch.get_num_threads(),
    )
    if status == _BAD_INDEX and index is not None:
        check_index(index, width)
    if status:
        raise KernelUnavailable(f"The native kernels stopped: {_FAILURES.get(status, f'status {status}')}.")
    return out


@functools.lru_cache(maxsize=4096)
def _problem(
    out_features: int,
    in_features: int,
    width: int,
    bits: int,
    x_bits: int,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    x_symmetric: bool,
    index_bytes: int,
    isa: int,
) -> ctypes.Array[IntProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    description = IntProblem(
        out_features,
        in_features,
        width,
        bits,
        x_bits,
        DTYPES[x_dtype],
        DTYPES[scale_dtype],
        int(x_symmetric),
        index_bytes,
        isa,
    )
    return (IntProblem * 1)(description)
