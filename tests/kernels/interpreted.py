"""Triton's kernels without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(code: str) -> str:
    """What code prints with Triton's kernels interpreted, in a process of its own: TRITON_INTERPRET is read once.

    It finds these tests as the package `kernels`.
    """
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRIMTAB_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
