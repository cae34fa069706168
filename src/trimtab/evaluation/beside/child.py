"""The process that measures one system: its memory, threads and failures are its own.

    python -m trimtab.evaluation.beside.child JOB

JOB is JSON: the package of the benchmark, the system's opener and options, the directory, the setting. The
package's module `measure` has `Setting` and `measure`. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any


def measure_job(job: dict[str, Any]) -> dict[str, Any]:
    """Open the system and measure it; adds the resident set with the model loaded, and its peak."""
    module, _, function = job["opener"].partition(":")
    opener = getattr(importlib.import_module(f"{job['package']}.{module}"), function)
    bench = importlib.import_module(f"{job['package']}.measure")
    setting = bench.Setting(**job["setting"])
    session = opener(Path(job["folder"]), setting, **job["options"])
    loaded = memory("VmRSS")
    figures = bench.measure(session, setting)
    return {"loaded_rss_bytes": loaded, "peak_rss_bytes": memory("VmHWM"), **figures}


def memory(field: str) -> int:
    """VmRSS or VmHWM, in bytes. From the kernel where it tells: ru_maxrss counts what the parent had, and
    `probes.memory` loads torch."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


if __name__ == "__main__":
    figures = measure_job(json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(figures) + "\n")
    sys.stdout.flush()
