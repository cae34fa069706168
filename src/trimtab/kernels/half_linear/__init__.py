"""Multiply few rows by a dense 16-bit weight, as decoding does: `x W^T + b` at the speed of memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.half_linear import native
from trimtab.kernels.half_linear.native import MAX_ROWS
from trimtab.kernels.half_linear.reference import half_linear_reference
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["HALF_LINEAR", "MAX_ROWS", "half_linear"]

HALF_LINEAR = KernelOp(
    "half_linear",
    reference=half_linear_reference,
    backends=(Backend("native", run=native.half_linear_native, absent=library.absent, refuses=native.refuses),),
)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> x @ weight^T + bias [..., out], rounded once to the dtype of x.

    weight   [out, in] in the dtype of x; native kernels take bfloat16 and float16
    bias     [out] in the dtype of x, or None

    Sums are float32. The native kernel takes at most MAX_ROWS rows of x; the reference converts the weight to float32,
    so with more rows, or where there is no native kernel, `torch.nn.functional.linear` is the better call. Raises
    ConfigError for shapes and dtypes that do not fit each other, KernelUnavailable if the environment demands a backend
    that cannot run this.
    """
    _check(
        x.shape[-1:],
        weight.shape,
        None if bias is None else bias.shape,
        x.dtype,
        weight.dtype,
        None if bias is None else bias.dtype,
    )
    return HALF_LINEAR(x, weight, bias)


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    if len(weight) != 2:
        raise ConfigError(f"the weight is {list(weight)}; a linear takes [out, in].")
    if tuple(last) != (weight[1],):
        raise ConfigError(f"x ends in {list(last)}, but the weight is {list(weight)}, [out, in].")
    if bias is not None and tuple(bias) != (weight[0],):
        raise ConfigError(f"the bias is {list(bias)}; a weight of {list(weight)} takes [{weight[0]}].")
    if weight_dtype != dtype or bias_dtype not in (None, dtype):
        raise ConfigError(
            f"x is {dtype}, the weight {weight_dtype}, the bias {bias_dtype}; they must have one dtype. "
            "Convert them with .to()."
        )
