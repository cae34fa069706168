"""Memory of this process while something runs: peak resident set, and bytes of live tensors."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.005


@dataclass(slots=True)
class PeakMemory:
    """Filled when the block ends.

    before_rss_bytes    resident set when the block began
    peak_rss_bytes      highest resident set while it ran
    peak_device_bytes   highest memory of CUDA tensors while it ran; None without CUDA
    exact               the kernel recorded the peak (Linux); else it is the highest of samples 5 ms apart
    """

    before_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None
    exact: bool = False

    @property
    def added_rss_bytes(self) -> int:
        """How much the block added to the resident set at its peak."""
        return self.peak_rss_bytes - self.before_rss_bytes


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def resident_bytes() -> int:
    """Resident set of this process now; where the system does not tell, its highest so far."""
    if (now := _status_bytes("VmRSS")) is not None:
        return now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> bool:
    """Ask the kernel to begin a new record of the peak. False where it cannot, or may not."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the memory of a block: `with peak_memory() as memory: ...; memory.peak_rss_bytes`."""
    memory = PeakMemory()
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    memory.before_rss_bytes = memory.peak_rss_bytes = resident_bytes()
    memory.exact = _reset_peak()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            memory.peak_rss_bytes = max(memory.peak_rss_bytes, resident_bytes())

    sampler = None if memory.exact else threading.Thread(target=sample, daemon=True)
    if sampler:
        sampler.start()
    try:
        yield memory
    finally:
        done.set()
        if sampler:
            sampler.join()
        recorded = _status_bytes("VmHWM") if memory.exact else resident_bytes()
        memory.peak_rss_bytes = max(memory.peak_rss_bytes, recorded or 0)
        if cuda:
            memory.peak_device_bytes = torch.cuda.max_memory_allocated()


def live_tensor_bytes(device: str | None = None) -> int:
    """Bytes of all tensors that Python still holds; storage that several share is counted once.

    device   "cpu", "cuda", ...: only there; None: everywhere but on "meta"
    """
    storages: dict[tuple[str, int], int] = {}
    for found in gc.get_objects():
        # isinstance would ask for __class__, which some lazy objects of other libraries answer with an import
        if not issubclass(type(found), torch.Tensor) or found.device.type == "meta":
            continue
        if device is not None and found.device.type != device:
            continue
        storage = found.untyped_storage()
        storages[str(found.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
