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

from trimtab.kernels.int_matmul.reference import check_index
from trimtab.kernels.library import DTYPES, IntProblem, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

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
    return refused(tensors, ("x", "weight_scales"))


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
    check(status)
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
