"""The run: one process per system, one entry per system, shape and number of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.evaluation.kv_decode._run import measure_system
from trimtab.evaluation.kv_decode.systems import System
from trimtab.evaluation.linear_speed.measure import Setting
from trimtab.kernels.bandwidth import read_bandwidth_gbps


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Entries {"bench", "system", "shape", "rows", ...} with the figures of `measure`, and the share of the memory
    bandwidth, measured just before, that reading the weight once per product reaches.

    threads   for every system; None: as many as this process may use
    tell      called with a line of progress per system

    A system that is not installed has one entry with "skipped", one that fails one with "error"; the others go on.
    """
    count = threads or len(os.sched_getaffinity(0))
    entries: list[dict[str, Any]] = []
    for number, system in enumerate(systems, 1):
        entry: dict[str, Any] = {"bench": setting.bench, "system": system.name}
        if reason := system.absent():
            tell(f"{number}/{len(systems)} {system.name}: skipped: {reason}")
            entries.append({**entry, "skipped": reason})
            continue
        tell(f"{number}/{len(systems)} {system.name}")
        bandwidth = read_bandwidth_gbps(count)
        figures = measure_system(system, Path(), setting, count)
        if "error" in figures:
            tell(f"{system.name} failed: {figures['error']}")
            entries.append({**entry, **figures})
        for product in figures.get("products", ()):
            gbps = product["weight_bytes"] / product["decode_ms_median"] / 1e6
            shares = {"read_gbps_median": gbps, "bandwidth_gbps": bandwidth, "bandwidth_share": gbps / bandwidth}
            entries.append({**entry, "threads": count, **product, **shares})
    return entries
