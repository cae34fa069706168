"""Speed of int_matmul beside torch's bfloat16 linear: batch 1 to 64, where memory limits, and a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.bench import _TORCH, Calls, Shape, _demand_parity, _dense_calls, _dense_weights, _inputs, _time
from trimtab.kernels.int_matmul import int_matmul
from trimtab.kernels.int_matmul.reference import int_matmul_reference
from trimtab.kernels.packing import packed_bytes

SHAPES = tuple(Shape(4096, 11008, batch) for batch in (1, 8, 64, 512))
BITS = ((4, 4), (4, 8), (8, 8))
"""Bits of weights and of inputs."""
_CHECKED_ROWS = 64


def int_matmul_bench(shapes: Sequence[Shape] = SHAPES, bits: Sequence[tuple[int, int]] = BITS) -> list[dict[str, Any]]:
    """Inputs with a scale per row, each number of bits, and torch's bfloat16 linear on the same shapes."""
    entries = []
    for shape in shapes:
        x = _inputs(shape)
        systems = {f"trimtab/int-w{w}a{a}": _calls(shape, w, a, x) for w, a in bits}
        systems[_TORCH] = _dense_calls(_dense_weights(shape), x, torch.nn.functional.linear, _TORCH)
        entries += _time("int-matmul", str(shape), systems)
    return entries


def _calls(shape: Shape, bits: int, x_bits: int, x: Tensor) -> Calls:
    """One call per distinct matrix, and the bytes of one: codes and scales. Raises NumericsError if parity is red."""
    generator = torch.Generator().manual_seed(bits)
    row = packed_bytes(shape.in_features, bits)
    nbytes = shape.out_features * (row + 2)
    options: dict[str, Any] = {"bits": bits, "in_features": shape.in_features, "x_bits": x_bits}
    calls: list[Callable[[], object]] = []
    for _ in range(max(2, -(-shape.traffic_bytes // nbytes))):
        packed = torch.randint(0, 256, (shape.out_features, row), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(shape.out_features, generator=generator) + 0.5).half()
        if not calls:
            part = slice(0, _CHECKED_ROWS)
            expected = int_matmul_reference(x, packed[part], scales[part], **options).float()
            _demand_parity(int_matmul(x, packed, scales, **options)[:, part], expected, f"int-w{bits}a{x_bits}")
        calls.append(lambda p=packed, s=scales: int_matmul(x, p, s, **options))  # type: ignore[misc]
    return calls, nbytes
