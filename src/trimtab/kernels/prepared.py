"""Products with fixed weights while decoding: what a call finds out about its arguments every time, found out once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.library import DTYPES
from trimtab.kernels.op import KERNELS_VARIABLE

MAX_ROWS = 8
"""Rows of x: with more, the product takes so long that what a call costs beside it no longer counts."""


class PreparedProducts:
    """The native product of one input with several weights, described to the library once.

    tensors       of the weights, which keep their memory: what exchanges one makes another
    in_features   of all weights; `sizes`: their out_features
    described     what the library reads of the weights; None where it cannot
    function      of the library: (described, count, x, out, rows, dtype, isa, threads) -> status

    `run` gives what the operation gives, bit for bit, for inputs that it `accepts`; others have more to do than to call
    the library (gradients, many rows, other devices, TRIMTAB_KERNELS).
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        in_features: int,
        sizes: Sequence[int],
        described: ctypes.Array[Any] | None,
        function: Callable[..., int] | None,
    ) -> None:
        self._tensors = list(tensors)
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._in_features = in_features
        self._sizes = list(sizes)
        self._total = sum(self._sizes)
        self._described, self._function = described, function
        self._isa = library.isa_limit() if function is not None else 0

    def accepts(self, x: Tensor) -> bool:
        """Whether `run` may be called with this input, now."""
        shape = x.shape
        return (
            self._function is not None
            and type(x) is Tensor
            and x.dtype in DTYPES
            and x.is_cpu
            and 2 <= len(shape) <= 3
            and shape[-1] == self._in_features
            and 0 < shape.numel() <= MAX_ROWS * self._in_features
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not os.environ.get(KERNELS_VARIABLE)
            and [tensor.data_ptr() for tensor in self._tensors] == self._pointers
        )

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [rows, in] or [batch, rows, in] times each weight."""
        assert self._function is not None
        shape = x.shape
        rows = shape.numel() // self._in_features
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty(rows * self._total, dtype=x.dtype)
        status = self._function(
            self._described,
            len(self._sizes),
            x.data_ptr(),
            out.data_ptr(),
            rows,
            DTYPES[x.dtype],
            self._isa,
            torch.get_num_threads(),
        )
        library.check(status)
        outer, results, start = shape[:-1], [], 0
        if len(self._sizes) == 1:
            return (out.view(*outer, self._total),)
        for size in self._sizes:
            steps = (size, 1) if len(outer) == 1 else (outer[-1] * size, size, 1)
            results.append(out.as_strided((*outer, size), steps, start))
            start += rows * size
        return tuple(results)
