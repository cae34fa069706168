"""Speed of gather_matmul beside half_linear and torch's bfloat16 linear, by share of the columns that count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.bench import _TORCH, Calls, Shape, _demand_parity, _dense_calls, _dense_weights, _inputs, _time
from trimtab.kernels.gather_matmul import gather_matmul
from trimtab.kernels.gather_matmul.reference import counts, gather_matmul_reference
from trimtab.kernels.half_linear import half_linear

SHAPES = tuple(Shape(*size, 1) for size in ((4096, 11008), (2048, 2048), (5632, 2048), (2048, 5632)))
CASES = ((1.0, 0), (0.6, 0), (0.5, 0), (0.4, 0), (0.475, 64))
"""(share of the columns that count, rank of the term for the rest)."""


def gather_matmul_bench(
    shapes: Sequence[Shape] = SHAPES, cases: Sequence[tuple[float, int]] = CASES
) -> list[dict[str, Any]]:
    """bfloat16 weights by columns, and the same dense ones by half_linear and torch. Bytes are those that are read."""
    entries = []
    for shape in shapes:
        x, dense = _inputs(shape), _dense_weights(shape)
        systems = {
            f"trimtab/gather-{share:.1%}" + (f"-rank-{rank}" if rank else ""): _calls(shape, share, rank, x)
            for share, rank in cases
        }
        linears = {"trimtab/half-linear": half_linear, _TORCH: torch.nn.functional.linear}
        systems |= {system: _dense_calls(dense, x, linear, system) for system, linear in linears.items()}
        entries += _time("gather-matmul", str(shape), systems)
    return entries


def _calls(shape: Shape, share: float, rank: int, x: Tensor) -> Calls:
    """One call per distinct matrix, and the bytes that one reads of it. Raises NumericsError if parity is red."""
    outputs, inputs = shape.out_features, shape.in_features
    kept = round(share * inputs)
    threshold = -1.0 if kept == inputs else float(x[0].abs().float().sort(descending=True).values[kept])
    nbytes = 2 * int(counts(x, threshold).any(0).sum()) * outputs + 2 * rank * (inputs + outputs)
    calls: list[Callable[[], object]] = []
    for seed in range(max(2, -(-shape.traffic_bytes // (2 * inputs * outputs)))):
        generator = torch.Generator().manual_seed(seed)
        columns, left, right = (
            torch.empty(size, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator)
            for size in ((inputs, outputs), (outputs, rank), (rank, inputs))
        )
        factors = (left, right) if rank else (None, None)
        if not calls:
            found = gather_matmul(x, columns, threshold, None, *factors)
            expected = gather_matmul_reference(x.float(), columns, threshold, None, *factors)
            _demand_parity(found, expected, f"gather, {share:.0%} of the columns, rank {rank}")
        calls.append(functools.partial(gather_matmul, x, columns, threshold, None, *factors))
    return calls, nbytes
