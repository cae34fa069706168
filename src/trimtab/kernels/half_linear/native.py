"""The C++ kernel of native/half_linear.cpp on CPU tensors, through ctypes.

bfloat16 is multiplied by the dot product instruction where the processor has AVX-512 BF16, which takes subnormal
numbers as zero; in every other case numbers become float32 in registers. All sums are float32. Rows of x do not
influence each other and neither does the number of threads. Every row of weights is read once for all rows of x.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.kernels.library import DTYPES, LinearProblem, check, isa_limit, native_library
from trimtab.kernels.refusals import GRADIENT

MAX_ROWS = 8
"""Rows of x that one pass over the weight takes; with more, torch's blocked product is as good."""
_HALVES = (torch.bfloat16, torch.float16)


def refuses(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why these arguments need another way, or None. Dense layers ask for every token: `refused` takes longer."""
    if not (x.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu)):
        return f"x is on {x.device} and weight on {weight.device}, native kernels read CPU memory"
    if weight.dtype not in _HALVES:
        return f"the weight is {weight.dtype}; this kernel is for bfloat16 and float16"
    if x.shape.numel() > MAX_ROWS * weight.shape[1]:
        return f"x of shape {list(x.shape)} has more than {MAX_ROWS} rows"
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return f"the weight of shape {list(weight.shape)}, or its bias, is not contiguous"
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return GRADIENT
    return None


def half_linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`half_linear` in C++, on the CPU, for input that `refuses` has no objection to."""
    out_features, in_features = weight.shape
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if not out.numel():
        return out
    if not in_features:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    x = x.contiguous()
    status = native_library().tt_half_linear(
        _problem(out_features, in_features, x.dtype, isa_limit()),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // in_features,
        torch.get_num_threads(),
    )
    check(status)
    return out


@functools.lru_cache(maxsize=4096)
def _problem(out_features: int, in_features: int, dtype: torch.dtype, isa: int) -> ctypes.Array[LinearProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    return (LinearProblem * 1)(LinearProblem(out_features, in_features, DTYPES[dtype], isa))
