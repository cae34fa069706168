"""What this machine offers: memory bandwidth as measured now, and which kernels run here or why they do not."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels import library
from trimtab.kernels.codebook_matmul import CODEBOOK_MATMUL
from trimtab.kernels.gather_matmul import GATHER_MATMUL
from trimtab.kernels.grid_matmul import GRID_MATMUL
from trimtab.kernels.half_linear import HALF_LINEAR
from trimtab.kernels.int_matmul import INT_MATMUL
from trimtab.kernels.kv_attention import KV_ATTENTION
from trimtab.kernels.sparse_matmul import SPARSE_MATMUL

OPERATIONS = (
    CODEBOOK_MATMUL,
    GATHER_MATMUL,
    GRID_MATMUL,
    HALF_LINEAR,
    INT_MATMUL,
    KV_ATTENTION,
    SPARSE_MATMUL,
)
_BUFFER_BYTES = 256 << 20  # several times the last-level cache of most machines
_ROUNDS = 7


def read_bandwidth_gbps(threads: int | None = None) -> float:
    """10^9 bytes per second that plain reading of memory reaches: the best of several rounds over 256 MiB.

    threads   as many as torch uses, unless given

    Without the native library the rate is that of torch's sum, which is lower than what the memory gives.
    """
    buffer = torch.ones(_BUFFER_BYTES, dtype=torch.uint8)
    try:
        native = library.native_library()
    except KernelUnavailable:
        return _torch_read_gbps(buffer)
    count = threads or torch.get_num_threads()
    best = min(native.tt_read_seconds(buffer.data_ptr(), _BUFFER_BYTES, count) for _ in range(_ROUNDS))
    return _BUFFER_BYTES / float(best) / 1e9


def _torch_read_gbps(buffer: torch.Tensor) -> float:
    import time

    words, best = buffer.view(torch.float32), float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - start)
    return _BUFFER_BYTES / best / 1e9


def kernel_report() -> list[dict[str, Any]]:
    """Per operation and backend: {"operation", "backend", "available", "detail"}; the reference is always there.

    `detail` says why a backend is absent, or what it runs with (instruction sets, threads).
    """
    report: list[dict[str, Any]] = []
    for operation in OPERATIONS:
        for backend in operation.backends:
            reason = backend.absent()
            detail = reason or (_native_detail() if backend.name == "native" else "")
            report.append(
                {"operation": operation.name, "backend": backend.name, "available": reason is None, "detail": detail}
            )
        report.append(
            {"operation": operation.name, "backend": "reference", "available": True, "detail": "PyTorch, any device"}
        )
    return report


def _native_detail() -> str:
    threads = f"{torch.get_num_threads()} threads" if library.native_library().tt_openmp() else "1 thread: no OpenMP"
    return f"{', '.join(library.machine_isas())}; {threads}"
