"""`trimtab doctor`: what this installation can do here, and why not."""

from __future__ import annotations

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

    found = {
        "versions": versions(),
        "machine": machine(),
        "read_bandwidth_gbps": read_bandwidth_gbps(),
        "kernels": kernel_report(),
    }
    if as_json:
        emit_json(found)
