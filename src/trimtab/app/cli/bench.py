"""`trimtab bench [NAME]`: speed of the kernels, beside torch and the machine's memory bandwidth."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, table
from trimtab.app.report import text

EXAMPLES = ("trimtab bench", "trimtab bench grid_matmul --json")


def run(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One benchmark; without it, all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the kernels on this machine.

    Each is measured beside torch and beside the memory bandwidth, after its results were compared with the reference's.
    """
    from trimtab.kernels import bench

    measured = bench.run(name)
    if as_json:
        emit_json(measured)
        return
    for bench_name in dict.fromkeys(str(entry["bench"]) for entry in measured):
        own = [entry for entry in measured if entry["bench"] == bench_name]
        columns = list(dict.fromkeys(key for entry in own for key in entry if key != "bench"))
        rows = [[_cell(entry.get(column)) for column in columns] for entry in own]
        show(table(bench_name, columns, rows, right=columns[2:]))


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return text.number(value) if isinstance(value, float) else text.NOTHING if value is None else str(value)
