"""The C++ kernels of native/ on CPU tensors, through ctypes.

bfloat16 inputs are multiplied exactly where the processor has AVX-512 BF16. In every other case inputs and weights are
float32, the weights rounded once as in the reference. All sums are float32. Rows of a batch do not influence each
other and neither does the number of threads, up to MAX_ROWS rows; with more rows the weight is written out block by
block, in the dtype of x, and multiplied by torch, because then arithmetic and not memory is the limit.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels.library import DTYPES, GridProblem, isa_limit, native_library

MAX_ROWS = 64
"""Rows of x up to which packed codes are multiplied as they are."""
BLOCK_WEIGHTS = 1 << 22
"""Weights written out at a time when there are more rows."""

_FAILURES = {1: "no instruction set it was built for is here", 2: "memory ran out"}


def refuses(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, in_features: int
) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = {"x": x, "packed": packed, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, native kernels read CPU memory"
        if name != "x" and not tensor.is_contiguous():
            return f"{name} of shape {list(tensor.shape)} is not contiguous"
    if x.dtype not in DTYPES or scales.dtype not in DTYPES:
        return f"x is {x.dtype} and scales are {scales.dtype}; native kernels take float32, float16 and bfloat16"
    if torch.is_grad_enabled() and (x.requires_grad or scales.requires_grad):
        return "a gradient is wanted, which only the reference has"
    return None


def grid_matmul_native(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, in_features: int
) -> Tensor:
    """`grid_matmul` in C++, on the CPU, for input that `refuses` has no objection to."""
    out_features = packed.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    rows = x.numel() // in_features
    if not rows or not out_features:
        return out
    x = x.contiguous()
    if rows > MAX_ROWS:
        return _by_blocks(x, packed, scales, zeros, bits, group_size, in_features, out)
    problem = _problem(out_features, in_features, group_size, bits, x.dtype, scales.dtype, isa_limit())
    status = native_library().tt_grid_matmul(
        problem,
        x.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    _check(status)
    return out


def dequantize_native(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight [out, in]: float32 arithmetic, then rounded to `dtype` (float32, float16, bfloat16)."""
    out = torch.empty((packed.shape[0], in_features), dtype=dtype)
    problem = _problem(packed.shape[0], in_features, group_size, bits, dtype, scales.dtype, isa_limit())
    status = native_library().tt_grid_dequantize(
        problem,
        packed.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        out.data_ptr(),
        packed.shape[0],
        torch.get_num_threads(),
    )
    _check(status)
    return out


@functools.lru_cache(maxsize=4096)
def _problem(
    out_features: int, in_features: int, group_size: int, bits: int, x: torch.dtype, scales: torch.dtype, isa: int
) -> ctypes.Array[GridProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    group = in_features if group_size == -1 else group_size
    description = GridProblem(out_features, in_features, group, bits, DTYPES[x], DTYPES[scales], isa)
    return (GridProblem * 1)(description)


def _by_blocks(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out: Tensor,
) -> Tensor:
    step = max(1, BLOCK_WEIGHTS // in_features)
    for start in range(0, packed.shape[0], step):
        part = slice(start, start + step)
        weight = dequantize_native(
            packed[part],
            scales[part],
            None if zeros is None else zeros[part],
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            dtype=x.dtype,
        )
        out[..., part] = torch.nn.functional.linear(x, weight)
    return out


def _check(status: int) -> None:
    if status:
        raise KernelUnavailable(f"The native kernels stopped: {_FAILURES.get(status, f'status {status}')}.")
