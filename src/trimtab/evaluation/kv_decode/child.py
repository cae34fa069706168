"""The process that measures one system: its memory, threads and failures are its own.

    python -m trimtab.evaluation.kv_decode.child JOB

JOB is JSON: the system's opener and options, the model's directory, the setting. The last line of standard output is
one JSON object.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

from trimtab.evaluation.kv_decode.measure import Session, Setting, measure


def measure_job(job: dict[str, Any]) -> dict[str, Any]:
    """Open the system and measure it; adds the resident set with the model loaded, and its peak."""
    module, _, function = job["opener"].partition(":")
    opener = getattr(importlib.import_module(f"trimtab.evaluation.kv_decode.{module}"), function)
    setting = Setting(**job["setting"])
    session: Session = opener(Path(job["model"]), setting, **job["options"])
    loaded = _memory("VmRSS")
    figures = measure(session, setting)
    return {**figures, "loaded_rss_bytes": loaded, "peak_rss_bytes": _memory("VmHWM")}


def _memory(field: str) -> int:
    """From the kernel where it tells: ru_maxrss counts what the parent had, and `probes.memory` loads torch."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


if __name__ == "__main__":
    figures = measure_job(json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(figures) + "\n")
    sys.stdout.flush()
