"""Multiply by a weight stored as codes of vectors: each g weights of a row are a sum of vectors from M codebooks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.codebook_matmul import native, triton
from trimtab.kernels.codebook_matmul.reference import codebook_matmul_reference
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["CODEBOOK_MATMUL", "codebook_matmul"]

CODEBOOK_MATMUL = KernelOp(
    "codebook_matmul",
    reference=codebook_matmul_reference,
    backends=(
        Backend("triton", run=triton.codebook_matmul_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.codebook_matmul_native, absent=library.absent, refuses=native.refuses),
    ),
)
_MAX_ENTRIES = {torch.uint8: 1 << 8, torch.int16: 1 << 16}


def codebook_matmul(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int) -> Tensor:
    """x [..., in] -> x @ W^T [..., out] in x.dtype; W[o, gj : gj+g] = scales[o] * sum_m codebooks[m, codes[o, j, m]].

    x          float32, bfloat16 or float16
    codes      [out, in / g, M]; uint8, or int16 whose bits are read as an unsigned number
    codebooks  float16 [M, 2^B, g]; B up to 8 for uint8 and up to 16 for int16
    scales     [out]; float16, bfloat16 or float32

    Codes are below 2^B, which is not checked: another one names some other vector, or zeros. Sums are float32. Native
    and Triton kernels are for g of 4, 8 and 16. Raises ConfigError for shapes and dtypes that do not fit each other,
    KernelUnavailable if the environment demands a backend that cannot run this.
    """
    _check(x.shape[-1:], codes.shape, codebooks.shape, scales.shape, codes.dtype, codebooks.dtype, in_features)
    return CODEBOOK_MATMUL(x, codes, codebooks, scales, in_features=in_features)


@functools.lru_cache(maxsize=4096)  # a model asks about few shapes, and asks for every token
def _check(
    last: torch.Size,
    codes: torch.Size,
    codebooks: torch.Size,
    scales: torch.Size,
    codes_dtype: torch.dtype,
    codebooks_dtype: torch.dtype,
    in_features: int,
) -> None:
    if tuple(last) != (in_features,) or in_features < 1:
        raise ConfigError(f"x ends in {list(last)}, but the weight has in_features={in_features}.")
    if codes_dtype not in _MAX_ENTRIES:
        raise ConfigError(f"codes are {codes_dtype}; they are uint8, or int16 for codebooks of more than 256 vectors.")
    most = _MAX_ENTRIES[codes_dtype]
    if len(codebooks) != 3 or codebooks_dtype != torch.float16 or not 0 < codebooks[1] <= most or 0 in codebooks:
        raise ConfigError(
            f"codebooks are {codebooks_dtype} {list(codebooks)}; {codes_dtype} codes take float16 [M, 2^B, g] "
            f"of at most {most} vectors."
        )
    if codebooks[1] & (codebooks[1] - 1):
        raise ConfigError(f"codebooks have {codebooks[1]} vectors; their number must be a power of two.")
    if in_features % codebooks[2]:
        raise ConfigError(f"vectors of {codebooks[2]} numbers do not divide in_features={in_features}.")
    wanted = (in_features // codebooks[2], codebooks[0])
    if len(codes) != 3 or tuple(codes[1:]) != wanted:
        raise ConfigError(
            f"codes are {list(codes)}; {in_features} inputs and codebooks {list(codebooks)} take "
            f"[out, {wanted[0]}, {wanted[1]}]."
        )
    if tuple(scales) != (codes[0],):
        raise ConfigError(f"scales are {list(scales)}; codes of {list(codes)} take [{codes[0]}].")
