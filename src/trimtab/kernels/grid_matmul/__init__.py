"""Multiply by a weight stored as packed codes with group scales: `x @ W^T` with `W = scale * (code - zero)`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.grid_matmul import native, triton
from trimtab.kernels.grid_matmul.reference import grid_matmul_reference
from trimtab.kernels.op import Backend, KernelOp
from trimtab.kernels.packing import packed_bytes

__all__ = ["GRID_MATMUL", "grid_matmul"]

GRID_MATMUL = KernelOp(
    "grid_matmul",
    reference=grid_matmul_reference,
    backends=(
        Backend("triton", run=triton.grid_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.grid_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)


def grid_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """x [..., in] -> x @ W^T [..., out] in the dtype of x.

    x           float32, bfloat16 or float16
    packed      uint8 [out, packed_bytes(in, bits)], the layout of kernels/packing.py
    scales      [out, groups]; float16, bfloat16 or float32
    zeros       uint8 [out, groups] in code units; None: 2^(bits-1) for all
    group_size  weights along `in` that share a scale, a divisor of in_features; -1: the whole row

    Sums are float32. An x with NaN or infinity gives rows that are not finite. Native kernels are fastest for groups of
    whole multiples of 32 or one group per row. Raises ConfigError for shapes and dtypes that do not fit each other,
    KernelUnavailable if the environment demands a backend that cannot run this.
    """
    _check(
        x.shape[-1:],
        packed.shape,
        scales.shape,
        None if zeros is None else zeros.shape,
        packed.dtype,
        None if zeros is None else zeros.dtype,
        bits,
        group_size,
        in_features,
    )
    return GRID_MATMUL(x, packed, scales, zeros, bits=bits, group_size=group_size, in_features=in_features)


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    packed: torch.Size,
    scales: torch.Size,
    zeros: torch.Size | None,
    packed_dtype: torch.dtype,
    zeros_dtype: torch.dtype | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    length = packed_bytes(in_features, bits)
    if tuple(last) != (in_features,):
        raise ConfigError(f"x ends in {list(last)}, but the weight has in_features={in_features}.")
    if len(packed) != 2 or packed[1] != length or packed_dtype != torch.uint8:
        raise ConfigError(
            f"packed codes are {packed_dtype} {list(packed)}; {in_features} inputs at {bits} bits take "
            f"uint8 [out, {length}]."
        )
    group = in_features if group_size == -1 else group_size
    if group < 1 or in_features % group:
        raise ConfigError(
            f"group_size={group_size} does not divide in_features={in_features}; -1 is one group per row."
        )
    wanted = (packed[0], in_features // group)
    for name, shape in (("scales", scales), ("zeros", zeros)):
        if shape is not None and tuple(shape) != wanted:
            raise ConfigError(
                f"{name} are {list(shape)}; groups of {group_size} over {in_features} take {list(wanted)}."
            )
    if zeros_dtype not in (None, torch.uint8):
        raise ConfigError(f"zeros are {zeros_dtype}; zero points are uint8 in code units.")
