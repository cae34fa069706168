"""Native kernels touch nothing outside their buffers: each ends, or begins, at a page that may not be touched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trimtab.kernels import library

CODE = """
import ctypes, itertools, mmap
import torch
from conftest import inputs, make_grid
from trimtab.kernels import library
from trimtab.kernels.grid_matmul import native

libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE

def fenced(tensor, at_end):
    '''A copy between two forbidden pages, flush with one of them.'''
    nbytes = tensor.numel() * tensor.element_size()
    inside = -(-nbytes // page) * page
    area = mmap.mmap(-1, inside + 2 * page)
    areas.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for forbidden in (start, start + page + inside):
        assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = page + (inside - nbytes if at_end else 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset).reshape(tensor.shape)
    return copy.copy_(tensor)

areas = []
cases = itertools.product((2, 3, 4, 8), ((1, -1), (7, 7), (33, 11), (95, 19), (336, 48), (704, 64), (1000, -1)))
for bits, (width, group_size) in cases:
    for rows, out, at_end in ((1, 5, True), (1, 5, False), (3, 9, True), (11, 2, True)):
        grid = make_grid(out, width, bits, group_size, symmetric=False)
        arguments = [fenced(tensor, at_end) for tensor in grid.arguments()]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = fenced(inputs(rows, width, dtype), at_end)
            plain, empty = native.grid_matmul_native(x, *arguments, **grid.options), torch.empty
            torch.empty = lambda *shape, dtype: fenced(empty(*shape, dtype=dtype), at_end)
            try:
                assert torch.equal(native.grid_matmul_native(x, *arguments, **grid.options), plain)
                native.dequantize_native(*arguments, **grid.options, dtype=dtype)
            finally:
                torch.empty = empty
        areas.clear()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.skipif(library.absent() is not None, reason=str(library.absent()))
@pytest.mark.parametrize("isa", library.ISAS)
def test_nothing_outside_the_buffers_is_touched(isa: str) -> None:
    """In a process of its own, which a stray access ends with a signal."""
    if isa not in library.machine_isas():
        pytest.skip(f"this machine has {', '.join(library.machine_isas())}")
    here = os.path.dirname(__file__)
    environment = os.environ | {"TRIMTAB_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([here, *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
