"""Native kernels touch nothing outside their buffers: each ends, or begins, at a page that may not be touched."""

from __future__ import annotations

import pytest

from trimtab.kernels import library

from .guarded import run_guarded

GRID_MATMUL = """
import itertools
import torch
from conftest import inputs, make_grid
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.grid_matmul import native

cases = itertools.product((2, 3, 4, 8), ((1, -1), (7, 7), (33, 11), (95, 19), (336, 48), (704, 64), (1000, -1)))
for bits, (width, group_size) in cases:
    for rows, out, at_end in ((1, 5, True), (1, 5, False), (3, 9, True), (11, 2, True)):
        grid = make_grid(out, width, bits, group_size, symmetric=False)
        arguments = [fenced(tensor, at_end) for tensor in grid.arguments()]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = fenced(inputs(rows, width, dtype), at_end)
            plain = native.grid_matmul_native(x, *arguments, **grid.options)
            with fenced_outputs(at_end):
                assert torch.equal(native.grid_matmul_native(x, *arguments, **grid.options), plain)
                native.dequantize_native(*arguments, **grid.options, dtype=dtype)
        areas.clear()
"""

HALF_LINEAR = """
import itertools
import torch
from conftest import inputs
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.half_linear import native

for dtype, width in itertools.product((torch.bfloat16, torch.float16), (1, 7, 17, 33, 96, 352, 1001)):
    for rows, out, at_end in ((1, 5, True), (1, 5, False), (3, 9, True), (8, 7, True), (8, 7, False)):
        x, weight, bias = inputs(rows, width, dtype), inputs(out, width, dtype), inputs(1, out, dtype)[0]
        plain = native.half_linear_native(x, weight, bias)
        arguments = [fenced(tensor, at_end) for tensor in (x, weight, bias)]
        with fenced_outputs(at_end):
            assert torch.equal(native.half_linear_native(*arguments), plain)
        areas.clear()
"""


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("code", [GRID_MATMUL, HALF_LINEAR], ids=["grid_matmul", "half_linear"])
def test_nothing_outside_the_buffers_is_touched(code: str, isa: str) -> None:
    run_guarded(code, isa)
