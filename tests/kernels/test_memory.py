"""Native kernels touch nothing outside their buffers: each ends, or begins, at a page that may not be touched."""

from __future__ import annotations

import pytest

from trimtab.kernels import library

from .guarded import run_guarded

GRID_MATMUL = """
import itertools
from dataclasses import replace
import torch
from conftest import inputs, make_grid
from guarded import areas, fenced, fenced_outputs
from trimtab.kernels.grid_matmul import native

shapes = ((1, -1), (7, 7), (33, 11), (95, 19), (336, 48), (704, 64), (1000, -1))
cases = itertools.product((2, 3, 4, 8), shapes, ("fractional", "row_levels"))
for bits, (width, group_size), kind in cases:
    if bits == 8 and kind == "row_levels":
        continue
    for rows, out, at_end in ((1, 5, True), (1, 5, False), (3, 9, True), (11, 2, True), (66, 3, True)):
        given = make_grid(out, width, bits, group_size, kind).given
        given = replace(given, **{name: fenced(tensor, at_end) for name, tensor in given.tensors().items()})
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = fenced(inputs(rows, width, dtype), at_end)
            (plain,) = native.grid_matmul_native(x, [given])
            with fenced_outputs(at_end):
                assert torch.equal(native.grid_matmul_native(x, [given])[0], plain)
                native.dequantize_native(given, dtype)
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
