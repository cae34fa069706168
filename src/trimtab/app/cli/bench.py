"""`trimtab bench [NAME]`: speed of the kernels, beside torch and the machine's memory bandwidth."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, wide_table
from trimtab.app.report import text

EXAMPLES = ("trimtab bench", "trimtab bench grid-matmul --json")


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
    for bench_name, setting in dict.fromkeys((entry["bench"], entry["setting"]) for entry in measured):
        own = [entry for entry in measured if (entry["bench"], entry["setting"]) == (bench_name, setting)]
        figures = list(
            dict.fromkeys(key for entry in own for key in entry if key not in ("bench", "setting", "system"))
        )
        rows = [[str(entry["system"]), *(_cell(entry.get(figure)) for figure in figures)] for entry in own]
        names = [figure.replace("_", " ") for figure in figures]
        show(*wide_table(f"{bench_name}: {setting}", ["system", *names], rows))


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return text.number(value) if isinstance(value, float) else text.NOTHING if value is None else str(value)
