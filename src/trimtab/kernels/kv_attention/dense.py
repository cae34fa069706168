"""Attention of one query per head over many dense keys and values, all visible: decoding with a plain cache.

The kernel is that of runs (native.py), on tensors as they are; this describes them in a few microseconds. Where eight
queries share keys it takes 0.75 of the time of torch's kernel at 1,024 tokens, 0.55 at 4,096.
"""

from __future__ import annotations

import functools
import os
import struct

import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.kv_attention import native
from trimtab.kernels.library import DTYPES
from trimtab.kernels.op import KERNELS_VARIABLE

MIN_TOKENS = 256
"""Keys from which on it pays; with fewer, torch's kernel is as fast as the description."""


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `one_query` may be called: it pays, no gradient is wanted, and the kernel reads these tensors."""
    return (
        key.shape[2] >= MIN_TOKENS
        and query.shape[2] == 1
        and query.dtype in DTYPES
        and all(type(tensor) is Tensor and tensor.is_cpu and tensor.stride(3) == 1 for tensor in (query, key, value))
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape == (query.shape[0], *key.shape[1:3], query.shape[3])
        and query.shape[1] % key.shape[1] == 0
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and os.environ.get(KERNELS_VARIABLE) in (None, "", "native")
        and not torch.compiler.is_compiling()
        and library.absent() is None
        and library.machine_isas() != ("scalar",)  # which is slower than torch's
    )


def one_query(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v: query [R, Hq, 1, d], key and value [R, Hk, n, d] that `takes` admits -> [R, 1, Hq, d].

    Query head h reads KV head h // (Hq / Hk). Sums are float32; the result has the dtype of the query.
    """
    rows, query_heads, _, dim = query.shape
    heads, tokens = key.shape[1:3]
    out = torch.empty((rows, 1, query_heads, dim), dtype=query.dtype)
    lse = torch.empty(rows * query_heads)
    lanes, numbers = _lanes(rows, heads, tokens)
    runs = b"".join(native.exact_run(tensor, row) for row in range(rows) for tensor in (key, value))
    native.run(
        native.problem(query, out, lse, group=query_heads // heads, lanes=rows, scale=scale), lanes, numbers, runs
    )
    return out


@functools.lru_cache(maxsize=64)
def _lanes(rows: int, heads: int, tokens: int) -> tuple[bytes, bytes]:
    """A lane per row, of all its heads, keys and values one run each; and the numbers of the heads."""
    packed = b"".join(native.LANE.pack(row, tokens, 0, heads, 2 * row, 1, 2 * row + 1, 1) for row in range(rows))
    return packed, struct.pack(f"={heads}q", *range(heads))
