"""`trimtab doctor`: what this installation can do here, and why not."""

from __future__ import annotations

from typing import Any

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, table
from trimtab.app.report import text
from trimtab.core.run_record import machine, versions

EXAMPLES = ("trimtab doctor", "trimtab doctor --json")


def run(as_json: AsJson = False) -> None:
    """Check this installation.

    Shows versions, processor, memory, the memory bandwidth measured now, and which kernels run here or why they do not.
    """
    from trimtab.kernels.bandwidth import kernel_report, read_bandwidth_gbps

    found: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "read_bandwidth_gbps": read_bandwidth_gbps(),
        "kernels": kernel_report(),
    }
    if as_json:
        emit_json(found)
        return
    facts = [(name, str(value)) for name, value in found["machine"].items() if name != "memory_bytes"]
    memory = found["machine"]["memory_bytes"]
    facts.append(("memory", text.NOTHING if memory is None else text.size(memory)))
    facts.append(("read bandwidth", f"{found['read_bandwidth_gbps']:.1f} GB/s, measured now"))
    kernels = [
        (entry["operation"], entry["backend"], "yes" if entry["available"] else "no", entry["detail"])
        for entry in found["kernels"]
    ]
    show(
        table("Versions", ("package", "version"), list(found["versions"].items())),
        table("Machine", ("", ""), facts),
        table("Kernels, fastest first", ("operation", "backend", "runs here", "with, or why not"), kernels),
    )
