"""Speed of sparse_matmul beside half_linear and torch's bfloat16 linear, by share of the weights kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.bench import _TORCH, Calls, Shape, _demand_parity, _dense_calls, _dense_weights, _inputs, _time
from trimtab.kernels.half_linear import half_linear
from trimtab.kernels.sparse_matmul import SparseWeight, sparse_matmul
from trimtab.kernels.sparse_matmul.bitmap import code_bytes, pack_bits, pack_codes, row_offsets
from trimtab.kernels.sparse_matmul.reference import sparse_matmul_reference

SHAPES = tuple(Shape(*size, batch) for size in ((4096, 11008), (1024, 1024), (2816, 1024)) for batch in (1, 8))
KEEP = (0.5, 0.4, 0.3)
"""Shares kept; 0.5 also as 2:4, and with codes of 4 bits."""
_GROUP = 64


def sparse_matmul_bench(shapes: Sequence[Shape] = SHAPES, keep: Sequence[float] = KEEP) -> list[dict[str, Any]]:
    """Sparse bfloat16 weights and codes, and the dense ones by half_linear and torch."""
    entries = []
    for shape in shapes:
        x, dense = _inputs(shape), _dense_weights(shape)
        systems = {f"trimtab/sparse-{share:.0%}-kept": _calls(shape, share, x) for share in keep}
        systems["trimtab/sparse-2:4"] = _calls(shape, None, x)
        systems["trimtab/sparse-50%-kept+4bit"] = _calls(shape, 0.5, x, codes=True)
        linears = {"trimtab/half-linear": half_linear, _TORCH: torch.nn.functional.linear}
        systems |= {system: _dense_calls(dense, x, linear, system) for system, linear in linears.items()}
        entries += _time("sparse-matmul", str(shape), systems)
    return entries


def _calls(shape: Shape, share: float | None, x: Tensor, *, codes: bool = False) -> Calls:
    """One call per distinct matrix, and the bytes of one. A share of None is 2:4. Raises NumericsError if parity is
    red."""
    generator = torch.Generator().manual_seed(1)
    calls: list[Callable[[], object]] = []
    nbytes = traffic = 0
    while traffic < shape.traffic_bytes or len(calls) < 2:
        drawn = torch.rand(shape.out_features, shape.in_features, generator=generator)
        if share is None:
            ranks = drawn.view(shape.out_features, -1, 4).argsort(-1).argsort(-1)
            keep = (ranks < 2).view_as(drawn)
        else:
            keep = drawn < share
        weight = (_coded if codes else _numbers)(keep, generator)
        nbytes = sum(tensor.nbytes for tensor in weight.tensors().values())
        traffic += nbytes
        if not calls:
            found, expected = sparse_matmul(x, weight), sparse_matmul_reference(x.float(), (weight,))[0]
            _demand_parity(found, expected, "sparse 2:4" if share is None else f"sparse, {share:.0%} kept")
        calls.append(functools.partial(sparse_matmul, x, weight))
    return calls, nbytes


def _numbers(keep: Tensor, generator: torch.Generator) -> SparseWeight:
    dense = torch.empty(keep.shape, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator)
    return SparseWeight(pack_bits(keep), dense[keep], row_offsets(keep.sum(1)).int(), keep.shape[1])


def _coded(keep: Tensor, generator: torch.Generator) -> SparseWeight:
    codes = torch.randint(-8, 8, keep.shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(len(keep), -(-keep.shape[1] // _GROUP), generator=generator) + 0.5
    offsets = row_offsets(code_bytes(keep)).int()
    return SparseWeight(pack_bits(keep), pack_codes(codes, keep), offsets, keep.shape[1], scales.bfloat16(), _GROUP)
