"""Products with fixed weights while decoding: what `grid_matmul_many` finds out for every call, found out once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.grid_matmul import native
from trimtab.kernels.grid_matmul.weight import GridWeight, check_all
from trimtab.kernels.library import DTYPES, GridWeightStruct
from trimtab.kernels.op import KERNELS_VARIABLE

MAX_ROWS = 8
"""Rows of x: with more, the product takes so long that what a call costs beside it no longer counts."""


class PreparedGrids:
    """The native product of one input with several weights, described to the library once.

    Made of weights that keep their memory: what exchanges a tensor makes another. `run` gives what `grid_matmul_many`
    gives, bit for bit, for inputs that it `accepts`; others have more to do than to call the library (gradients, many
    rows, other devices, TRIMTAB_KERNELS).
    """

    def __init__(self, weights: Sequence[GridWeight]) -> None:
        check_all(weights)
        self._tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._in_features = weights[0].in_features
        self._sizes = [weight.out_features for weight in weights]
        self._total = sum(self._sizes)
        here = all(tensor.is_cpu for tensor in self._tensors) and library.absent() is None
        if here and native.refuses(torch.empty(1, self._in_features), weights) is None:
            self._described: ctypes.Array[GridWeightStruct] | None = (GridWeightStruct * len(weights))(
                *map(native.describe, weights)
            )
            self._isa = library.isa_limit()
            self._function = library.native_library().tt_grid_matmul
        else:
            self._described = None

    def accepts(self, x: Tensor) -> bool:
        """Whether `run` may be called with this input, now."""
        shape = x.shape
        return (
            self._described is not None
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
