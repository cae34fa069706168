"""Multiply whole numbers: inputs rounded in the call, weights stored as packed symmetric codes, scales afterwards."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.int_matmul import native, triton
from trimtab.kernels.int_matmul.reference import int_matmul_reference
from trimtab.kernels.op import Backend, KernelOp
from trimtab.kernels.packing import packed_bytes

__all__ = ["INT_MATMUL", "int_matmul"]

INT_MATMUL = KernelOp(
    "int_matmul",
    reference=int_matmul_reference,
    backends=(
        Backend("triton", run=triton.int_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.int_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)
_X_BITS = range(2, 9)
_INDEX_DTYPES = (torch.int32, torch.int64)


def int_matmul(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | Tensor | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """y[t, o] = weight_scales[o] * s[t] * sum_j W[o, j] * (q[t, j] - z[t]), with W and q whole numbers; x.dtype.

    x              [..., width], float32, bfloat16 or float16
    packed         uint8 [out, packed_bytes(in, bits)], the layout of kernels/packing.py; W = code - 2^(bits-1)
    weight_scales  [out]; float16, bfloat16 or float32
    x_bits         bits of q, 2 to 8
    x_scale        s of all rows, above 0: static. None: each row's own, from its largest magnitude
    x_symmetric    True: q = round(x / s) within +-(2^(x_bits-1) - 1), z = 0. False: from each row's smallest and
                   largest input, s = (max - min) / (2^x_bits - 1) within 1e-5 to 1e4, z = round(-min / s) and
                   q = round(x / s) + z within 0 to 2^x_bits - 1 (QLLM, arXiv:2310.08041); no x_scale then
    index          int32 or int64 [in]: input j is q[index[j]], so a repeated input repeats the same whole number, and
                   in_features may differ from width. None: input j is q[j]
    row_sums       int32 [out], sum_j W[o, j], which zero points act through; None: computed in the call where wanted

    Ties are rounded to even. Sums of products are exact (up to 2^31 in magnitude); the sum, z included, is rounded to
    float32, then multiplied by weight_scales[o], then by s[t]. A row with NaN, or with infinity where it finds its own
    scale, gives NaN; a static scale clips infinity. Rounding has no gradient. Raises ConfigError for shapes, dtypes and
    options that do not fit each other and for an index beyond x, KernelUnavailable if the environment demands a backend
    that cannot run this.
    """
    _check(
        x.shape[-1:],
        packed.shape,
        packed.dtype,
        weight_scales.shape,
        None if index is None else (index.shape, index.dtype),
        None if row_sums is None else (row_sums.shape, row_sums.dtype),
        bits,
        in_features,
        x_bits,
        x_symmetric,
    )
    scale = None if x_scale is None else float(x_scale)
    if scale is not None and not (x_symmetric and 0 < scale < float("inf")):
        why = "must be above 0 and finite" if x_symmetric else "is for symmetric inputs; rows find their own range"
        raise ConfigError(f"x_scale={scale} {why}. None: each row's own scale.")
    return INT_MATMUL(
        x,
        packed,
        weight_scales,
        bits=bits,
        in_features=in_features,
        x_bits=x_bits,
        x_scale=scale,
        x_symmetric=x_symmetric,
        index=index,
        row_sums=row_sums,
    )


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    packed: torch.Size,
    packed_dtype: torch.dtype,
    scales: torch.Size,
    index: tuple[torch.Size, torch.dtype] | None,
    row_sums: tuple[torch.Size, torch.dtype] | None,
    bits: int,
    in_features: int,
    x_bits: int,
    x_symmetric: bool,
) -> None:
    length = packed_bytes(in_features, bits)
    if x_bits not in _X_BITS:
        raise ConfigError(f"x_bits={x_bits} must be {_X_BITS[0]} to {_X_BITS[-1]}.")
    if len(packed) != 2 or packed[1] != length or packed_dtype != torch.uint8:
        raise ConfigError(
            f"packed codes are {packed_dtype} {list(packed)}; {in_features} inputs at {bits} bits take "
            f"uint8 [out, {length}]."
        )
    if tuple(scales) != (packed[0],):
        raise ConfigError(f"weight_scales are {list(scales)}; packed codes of {list(packed)} take [{packed[0]}].")
    if index is None and tuple(last) != (in_features,):
        raise ConfigError(
            f"x ends in {list(last)}, but the weight has in_features={in_features} and there is no index."
        )
    if index is not None and (tuple(index[0]) != (in_features,) or index[1] not in _INDEX_DTYPES):
        raise ConfigError(
            f"index is {index[1]} {list(index[0])}; in_features={in_features} takes int32 [{in_features}]."
        )
    if len(last) != 1 or not last[0]:
        raise ConfigError(f"x ends in {list(last)}; it must have at least one input.")
    if row_sums is not None and (tuple(row_sums[0]) != (packed[0],) or row_sums[1] != torch.int32):
        raise ConfigError(f"row_sums are {row_sums[1]} {list(row_sums[0])}; they are int32 [{packed[0]}].")
    if row_sums is not None and x_symmetric:
        raise ConfigError("row_sums are for zero points: with x_symmetric=True there are none; leave them out.")
