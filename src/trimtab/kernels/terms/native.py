"""The C++ kernels of native/terms.cpp on CPU tensors, through ctypes, for few rows of x.

The low-rank term multiplies in the 16-bit format of its factors (x and the inner result are brought into its range by
exact powers of two), the sparse term in float32. All sums are float32. Rows of x do not influence each other and
neither does the number of threads.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trimtab.kernels.library import DTYPES, TermProblem, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

MAX_ROWS = 8
_HALVES = (torch.bfloat16, torch.float16)


def low_rank_refuses(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> str | None:
    """Why these arguments need another way, or None."""
    if left.dtype not in _HALVES:
        return f"factors are {left.dtype}; this kernel is for bfloat16 and float16"
    return _refuses(out, x, {"left": left, "right": right})


def sparse_refuses(out: Tensor, x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> str | None:
    """Why these arguments need another way, or None."""
    if values.dtype not in DTYPES or columns.dtype != torch.int32 or offsets.dtype != torch.int32:
        return f"values are {values.dtype}, columns {columns.dtype}, offsets {offsets.dtype}"
    return _refuses(out, x, {"values": values, "columns": columns, "offsets": offsets})


def _refuses(out: Tensor, x: Tensor, term: dict[str, Tensor]) -> str | None:
    if out.dtype != x.dtype:
        return f"x is {x.dtype} and out {out.dtype}; both must have one dtype"
    if x.shape.numel() > MAX_ROWS * x.shape[-1]:
        return f"x of shape {list(x.shape)} has more than {MAX_ROWS} rows"
    return refused({"out": out, "x": x, **term}, ("x",))


def low_rank_add_native(out: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`low_rank_add` in C++ for what `low_rank_refuses` has no objection to; writes into `out`."""
    if not out.numel() or not right.numel():
        return out
    rank, in_features = right.shape
    x = x.contiguous()
    check(
        native_library().tt_low_rank_add(
            _problem(left.shape[0], in_features, rank, left.dtype, x.dtype, isa_limit()),
            x.data_ptr(),
            right.data_ptr(),
            left.data_ptr(),
            out.data_ptr(),
            x.numel() // in_features,
            torch.get_num_threads(),
        )
    )
    return out


def sparse_add_native(out: Tensor, x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """`sparse_add` in C++ for what `sparse_refuses` has no objection to; writes into `out`."""
    if not out.numel() or not values.numel():
        return out
    x = x.contiguous()
    check(
        native_library().tt_sparse_add(
            _problem(offsets.shape[0] - 1, x.shape[-1], values.shape[0], values.dtype, x.dtype, isa_limit()),
            x.data_ptr(),
            values.data_ptr(),
            columns.data_ptr(),
            offsets.data_ptr(),
            out.data_ptr(),
            x.numel() // x.shape[-1],
            torch.get_num_threads(),
        )
    )
    return out


@functools.lru_cache(maxsize=4096)
def _problem(
    out_features: int, in_features: int, size: int, dtype: torch.dtype, x: torch.dtype, isa: int
) -> ctypes.Array[TermProblem]:
    """The description that a call passes by address, kept because building it costs as much as a small product."""
    return (TermProblem * 1)(TermProblem(out_features, in_features, size, DTYPES[dtype], DTYPES[x], isa))
