"""Speed of sparse_matmul beside half_linear and torch's bfloat16 linear, by share of the weights kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.bench import _TORCH, Calls, Shape, _demand_parity, _dense_calls, _dense_weights, _inputs, _time
from trimtab.kernels.half_linear import half_linear
from trimtab.kernels.sparse_matmul import sparse_matmul
from trimtab.kernels.sparse_matmul.bitmap import pack_bits
from trimtab.kernels.sparse_matmul.reference import sparse_matmul_reference

SHAPES = tuple(Shape(*size, batch) for size in ((4096, 11008), (1024, 1024), (2816, 1024)) for batch in (1, 8))
KEEP = (0.5, 0.4, 0.3)
"""Shares kept; 0.5 also as 2:4."""


def sparse_matmul_bench(shapes: Sequence[Shape] = SHAPES, keep: Sequence[float] = KEEP) -> list[dict[str, Any]]:
    """Sparse bfloat16 weights, and the dense ones by half_linear and torch."""
    entries = []
    for shape in shapes:
        x, dense = _inputs(shape), _dense_weights(shape)
        systems = {f"trimtab/sparse-{share:.0%}-kept": _calls(shape, share, x) for share in keep}
        systems["trimtab/sparse-2:4"] = _calls(shape, None, x)
        linears = {"trimtab/half-linear": half_linear, _TORCH: torch.nn.functional.linear}
        systems |= {system: _dense_calls(dense, x, linear, system) for system, linear in linears.items()}
        entries += _time("sparse-matmul", str(shape), systems)
    return entries


def _calls(shape: Shape, share: float | None, x: Tensor) -> Calls:
    """One call per distinct matrix, and the bytes of one. A share of None is 2:4. Raises NumericsError if parity is
    red."""
    generator = torch.Generator().manual_seed(1)
    calls: list[Callable[[], object]] = []
    nbytes = traffic = 0
    while traffic < shape.traffic_bytes or len(calls) < 2:
        dense = torch.empty(shape.out_features, shape.in_features, dtype=torch.bfloat16)
        dense.uniform_(-1, 1, generator=generator)
        drawn = torch.rand(dense.shape, generator=generator)
        if share is None:
            ranks = drawn.view(shape.out_features, -1, 4).argsort(-1).argsort(-1)
            keep = (ranks < 2).view_as(dense)
        else:
            keep = drawn < share
        offsets = torch.zeros(shape.out_features + 1, dtype=torch.int32)
        offsets[1:] = keep.sum(1).cumsum(0)
        weight = pack_bits(keep), dense[keep], offsets
        nbytes = sum(tensor.nbytes for tensor in weight)
        traffic += nbytes
        if not calls:
            found = sparse_matmul(x, *weight, shape.in_features)
            expected = sparse_matmul_reference(x.float(), *weight, shape.in_features)
            _demand_parity(found, expected, "sparse" if share is None else f"sparse, {share:.0%} kept")
        calls.append(functools.partial(sparse_matmul, x, *weight, shape.in_features))
    return calls, nbytes
