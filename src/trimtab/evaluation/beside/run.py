"""The run: one process per system, what each measured as entries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.core.errors import NumericsError
from trimtab.evaluation.beside.base import Benchmark, System
from trimtab.kernels.bandwidth import read_bandwidth_gbps

_LIMIT_SECONDS = 3600


def run_systems(
    systems: Sequence[System],
    setting: Benchmark,
    make: Callable[[Path, Sequence[System]], None] | None,
    finish: Callable[[dict[str, Any], float], list[dict[str, Any]]],
    *,
    threads: int | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Entries {"bench", "system", "threads", ...} with the benchmark's labels and figures.

    make      called with an empty folder and the systems that are installed, writes what their openers read
    finish    figures of a system, GB/s of reading memory just before -> the figures of each of its entries; may raise
              NumericsError, which leaves the error in their place
    threads   for every system; None: as many as this process may use
    tell      called with a line of progress per system

    A system that is not installed has an entry with "skipped", the reason; one that fails has one with "error", and the
    others go on.
    """
    count = threads or len(os.sched_getaffinity(0))
    entries: list[dict[str, Any]] = []
    absent = {system.name: system.absent() for system in systems}
    with tempfile.TemporaryDirectory(prefix=f"trimtab-{setting.bench}-") as folder:
        chosen = [system for system in systems if not absent[system.name]]
        if make is not None and chosen:
            make(Path(folder), chosen)
        for number, system in enumerate(systems, 1):
            entry = {"bench": setting.bench, "system": system.name, **setting.labels}
            if reason := absent[system.name]:
                tell(f"{number}/{len(systems)} {system.name}: skipped: {reason}")
                entries.append({**entry, "skipped": reason})
                continue
            tell(f"{number}/{len(systems)} {system.name}")
            bandwidth = read_bandwidth_gbps(count)
            measured = measure_system(system, Path(folder), setting, count)
            try:
                found = [measured] if "error" in measured else finish(measured, bandwidth)
            except NumericsError as error:
                found = [{"error": str(error)}]
            for figures in found:
                if "error" in figures:
                    tell(f"{system.name} failed: {figures['error']}")
                entries.append({**entry, "threads": count, **figures})
    return entries


def measure_system(system: System, folder: Path, setting: Benchmark, threads: int) -> dict[str, Any]:
    """Measure in a process of its own; {"error": reason} if it fails, is killed or does not end within an hour."""
    job = {
        "package": setting.package,
        "opener": system.opener,
        "options": dict(system.options),
        "folder": str(folder),
        "setting": asdict(setting),
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "trimtab.evaluation.beside.child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_LIMIT_SECONDS} seconds"}
    if done.returncode == 0:
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = said[-1] if said else "it said nothing"
    if done.returncode < 0:
        return {"error": f"killed by {signal.Signals(-done.returncode).name}; last on standard error: {last}"}
    return {"error": last}


def read_speed(nbytes: float, milliseconds: float, bandwidth_gbps: float) -> dict[str, float]:
    """How fast something is read whose bytes are all read once in this time, beside what plain reading reaches."""
    gbps = nbytes / milliseconds / 1e6 if milliseconds > 0 else float("nan")
    return {"read_gbps_median": gbps, "bandwidth_gbps": bandwidth_gbps, "bandwidth_share": gbps / bandwidth_gbps}
