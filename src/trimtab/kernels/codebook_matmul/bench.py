"""Speed of codebook_matmul beside torch's bfloat16 linear, by length of vectors and number and size of codebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.bench import _TORCH, Calls, Shape, _demand_parity, _dense_calls, _dense_weights, _inputs, _time
from trimtab.kernels.codebook_matmul import codebook_matmul
from trimtab.kernels.codebook_matmul.reference import codebook_matmul_reference

SHAPES = tuple(Shape(4096, 11008, batch) for batch in (1, 8, 64))
KINDS = ((4, 1, 8), (8, 1, 8), (8, 2, 8), (16, 1, 8), (8, 1, 12), (8, 1, 16))
"""(numbers of a vector, codebooks, bits of a code)."""
_CHECKED_ROWS = 64


def codebook_matmul_bench(
    shapes: Sequence[Shape] = SHAPES, kinds: Sequence[tuple[int, int, int]] = KINDS
) -> list[dict[str, Any]]:
    """Codes of each kind, and torch's bfloat16 linear on the same shapes."""
    entries = []
    for shape in shapes:
        x = _inputs(shape)
        systems = {f"trimtab/codebook-{m}x{b}-g{g}": _calls(shape, g, m, b, x) for g, m, b in kinds}
        systems[_TORCH] = _dense_calls(_dense_weights(shape), x, torch.nn.functional.linear, _TORCH)
        entries += _time("codebook-matmul", str(shape), systems)
    return entries


def _calls(shape: Shape, g: int, books: int, bits: int, x: Tensor) -> Calls:
    """One call per distinct matrix, and the bytes of one: codes, codebooks, scales. Raises NumericsError if parity is
    red."""
    generator = torch.Generator().manual_seed(bits)
    dtype = torch.uint8 if bits <= 8 else torch.int16
    size = (shape.out_features, shape.in_features // g, books)
    nbytes = size[0] * size[1] * books * dtype.itemsize + 2 * (books * 2**bits * g + shape.out_features)
    calls: list[Callable[[], object]] = []
    for _ in range(max(2, -(-shape.traffic_bytes // nbytes))):
        codes = torch.randint(0, 2**bits, size, dtype=torch.int32, generator=generator).to(dtype)
        codebooks = torch.randn(books, 2**bits, g, generator=generator).half()
        scales = (torch.rand(shape.out_features, generator=generator) + 0.5).half()
        if not calls:
            part = slice(0, _CHECKED_ROWS)
            expected = codebook_matmul_reference(
                x.float(), codes[part], codebooks, scales[part], in_features=shape.in_features
            )
            found = codebook_matmul(x, codes, codebooks, scales, in_features=shape.in_features)[:, part]
            _demand_parity(found, expected, f"codebook-{books}x{bits}-g{g}")
        calls.append(
            lambda c=codes, b=codebooks, s=scales: codebook_matmul(x, c, b, s, in_features=shape.in_features)  # type: ignore[misc]
        )
    return calls, nbytes
