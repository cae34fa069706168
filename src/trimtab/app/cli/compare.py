"""`trimtab compare MODEL --methods ...`: several methods side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.app.cli.compress import CalibrationMode, Length, Mode, Sequences, Text
from trimtab.app.cli.evaluate import Limit, Tasks, checked_tasks
from trimtab.app.cli.options import (
    AsJson,
    Device,
    Force,
    Model,
    Seed,
    Settings,
    check_output,
    check_text,
    read_settings,
    split_names,
    split_numbers,
)
from trimtab.app.cli.output import emit_json, say, show, wide_table

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.app.comparison import Setting, Variant
    from trimtab.core.run_record import RunRecord

EXAMPLES = (
    "trimtab compare ref --methods rtn,gptq --bits 2,3,4 -o comparison",
    "trimtab compare ref --methods rtn,gptq --bits 3 --set group_size=32 --set gptq.act_order=true -o groups-of-32",
    "trimtab compare ref --methods gptq --tasks prose,recall --limit 50 -o quick --json",
)


def run(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Names separated by commas, as trimtab list has them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for report.html and the run records.")] = Path(
        "trimtab-comparison"
    ),
    bits: Annotated[
        str | None, typer.Option(help="Bits to try with each method, such as 2,3,4.", show_default="each method's own")
    ] = None,
    settings: Settings = None,
    tasks: Tasks = None,
    limit: Limit = None,
    text: Text = None,
    sequences: Sequences = 128,
    length: Length = None,
    mode: CalibrationMode = Mode.sequential,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods on one model: bytes, quality, speed, time.

    Ends with a table and a self-contained report.html.
    --set OPTION=VALUE goes to all methods, --set METHOD.OPTION=VALUE to one.
    """
    from trimtab.app.comparison import Setting, plan

    numbers = [] if bits is None else split_numbers(bits, "--bits")
    variants = plan(split_names(methods, "--methods"), numbers, read_settings(settings))
    names = checked_tasks(tasks)
    check_text(text)
    check_output(out, force, holds="runs")
    setting = Setting(
        model,
        names,
        limit=limit,
        text=text,
        sequences=sequences,
        length=length,
        mode=mode.value,
        seed=seed,
        device=device,
    )
    records = measure(setting, variants, out)
    if as_json:
        emit_json([record.to_dict() for record in records])
    else:
        show(*comparison_tables(model, records))
    say(f"Report: {out / 'report.html'}   records: {out / 'runs'}")


def measure(setting: Setting, variants: Sequence[Variant], out: Path) -> list[RunRecord]:
    """Run the comparison, tell how it goes, save records and report: of the finished rows if one fails."""
    from trimtab.app.comparison import run_all, save_records
    from trimtab.app.report.page import write_report

    records: list[RunRecord] = []
    try:
        for record in save_records(run_all(setting, variants), out):
            records.append(record)
            taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record.seconds.items())
            say(f"[{len(records)}/{len(variants)}] {record.config['label']}: {taken}")
    finally:
        if records:
            write_report(out / "runs")
    return records


def comparison_tables(model: str, records: Sequence[RunRecord]) -> list[Table]:
    """The terminal's form of the report's table."""
    from trimtab.app.report.page import cells_of, columns_of
    from trimtab.app.report.rows import row_of

    rows = [row_of(record) for record in records]
    columns = columns_of(rows)
    cells = [(row.label, *("\n".join(part for part in cell if part) for cell in cells_of(row, rows))) for row in rows]
    return wide_table(f"{model}: brackets hold 95 % intervals", columns, cells)
