"""Memory between two pages that may not be touched, and processes that a stray access ends."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from trimtab.kernels import library

areas: list[mmap.mmap] = []
"""Keeps the memory of `fenced` tensors; clear it when they are gone."""


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy between two forbidden pages, flush with one of them."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
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


@contextmanager
def fenced_outputs(at_end: bool) -> Iterator[None]:
    """torch.empty gives fenced memory."""
    empty: Callable[..., Tensor] = torch.empty
    torch.empty = lambda *shape, dtype: fenced(empty(*shape, dtype=dtype), at_end)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def run_guarded(code: str, isa: str) -> None:
    """Run code with this instruction set in a process of its own, which a stray access ends with a signal."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect")
    if reason := library.absent():
        pytest.skip(reason)
    if isa not in library.machine_isas():
        pytest.skip(f"this machine has {', '.join(library.machine_isas())}")
    environment = os.environ | {"TRIMTAB_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
