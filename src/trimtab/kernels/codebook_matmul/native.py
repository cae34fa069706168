"""The C++ kernels of native/codebook_matmul.cpp on CPU tensors, through ctypes.

Each code is one load of a whole vector, multiplied by the inputs of its group in one instruction. (Tables of the
inputs' products with all vectors would take one load per code as well, and 2^B products per group to make.) Sums are
float32. Rows of x do not influence each other and neither does the number of threads, up to MAX_ROWS rows; with more
the weight is written out block by block, in the dtype of x, and multiplied by torch.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.kernels.library import DTYPES, CodebookProblem, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

MAX_ROWS = 16
"""Rows of x up to which codes are multiplied as they are."""
BLOCK_WEIGHTS = 1 << 22
"""Weights written out at a time when there are more rows."""
GROUP_SIZES = (4, 8, 16)


def refuses(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int) -> str | None:
    """Why these arguments need another backend, or None."""
    if codebooks.shape[2] not in GROUP_SIZES:
        return f"vectors have {codebooks.shape[2]} numbers; this kernel is for {', '.join(map(str, GROUP_SIZES))}"
    return refused({"x": x, "codes": codes, "codebooks": codebooks, "scales": scales}, ("x", "scales"))


def codebook_matmul_native(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int) -> Tensor:
    """`codebook_matmul` in C++, on the CPU, for input that `refuses` has no objection to."""
    out_features = codes.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if not out.numel():
        return out
    x = x.contiguous()
    rows = x.numel() // in_features
    if rows > MAX_ROWS:
        return _by_blocks(x, codes, codebooks, scales, out)
    status = native_library().tt_codebook_matmul(
        _problem(codes.shape, codebooks.shape, codes.dtype, x.dtype, scales.dtype, isa_limit()),
        x.data_ptr(),
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    check(status)
    return out


def dequantize_native(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in]: float32 arithmetic, then rounded to `dtype` (float32, float16, bfloat16)."""
    out = torch.empty((codes.shape[0], codes.shape[1] * codebooks.shape[2]), dtype=dtype)
    status = native_library().tt_codebook_dequantize(
        _problem(codes.shape, codebooks.shape, codes.dtype, dtype, scales.dtype, isa_limit()),
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        codes.shape[0],
        torch.get_num_threads(),
    )
    check(status)
    return out


@functools.lru_cache(maxsize=4096)
def _problem(
    codes: torch.Size,
    codebooks: torch.Size,
    codes_dtype: torch.dtype,
    x: torch.dtype,
    scales: torch.dtype,
    isa: int,
) -> ctypes.Array[CodebookProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    books, entries, group_size = codebooks
    in_features = codes[1] * group_size
    description = CodebookProblem(
        codes[0], in_features, books, entries, group_size, codes_dtype.itemsize, DTYPES[x], DTYPES[scales], isa
    )
    return (CodebookProblem * 1)(description)


def _by_blocks(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    step = max(1, BLOCK_WEIGHTS // x.shape[-1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        weight = dequantize_native(codes[part], codebooks, scales[part], x.dtype)
        out[..., part] = torch.nn.functional.linear(x, weight)
    return out
