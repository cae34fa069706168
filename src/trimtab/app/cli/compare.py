"""`trimtab compare MODEL --methods ...`: several methods side by side, as a table and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.app.cli.compress import CalibrationMode, Length, Sequences, Text, named
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
from trimtab.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.run_record import RunRecord

EXAMPLES = (
    "trimtab compare ref --methods rtn,gptq --bits 2,3,4 -o comparison",
    "trimtab compare ref --methods rtn,gptq --bits 3 --set group_size=32 --set gptq.act_order=true -o groups-of-32",
    "trimtab compare ref --methods gptq --tasks prose,recall --limit 50 -o quick --json",
    "trimtab compare ref --caches exact,kivi,gear --bits 2,4 --set kivi.window=64 -o caches",
    "trimtab compare ref --decodings speculative,spectr,dola+rsd_s --set draft=ref-mini -o decodings",
)


def run(
    model: Model,
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas, as trimtab list has them.", show_default=False)
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(help="Instead of methods: names of KV caches, see trimtab list --room cache.", show_default=False),
    ] = None,
    decodings: Annotated[
        str | None,
        typer.Option(
            help="Instead of methods: ways to decode, A+B for two together, see trimtab list --room decoding.",
            show_default=False,
        ),
    ] = None,
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
    mode: CalibrationMode = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods on one model: bytes, quality, speed, time.

    Ends with a table and a self-contained report.html.
    --set OPTION=VALUE goes to all methods, --set METHOD.OPTION=VALUE to one.
    Caches are compared on the model as it is, which may be a compressed one: honest bits, what is lost, what is
    recalled at which distance; tasks are added if --tasks names them.
    """
    from trimtab.app.comparison import Setting, plan, run_all

    if sum(given is not None for given in (methods, caches, decodings)) != 1:
        raise ConfigError(
            "give one of --methods, which change the weights, --caches, which keep keys and values, and --decodings, "
            "which write the text."
        )
    numbers = [] if bits is None else split_numbers(bits, "--bits")
    if caches is not None:
        from trimtab.app.cache_comparison import CacheSetting, plan_caches, run_caches

        if text is not None:
            raise ConfigError("--text is for --methods; caches are fitted on the text that comes with trimtab.")
        cache_variants = plan_caches(split_names(caches, "--caches"), numbers, read_settings(settings))
        chosen = () if tasks is None else checked_tasks(tasks)
        check_output(out, force, holds="runs")
        cache_setting = CacheSetting(model, chosen, limit=limit, seed=seed, device=device)
        _finish(model, record(run_caches(cache_setting, cache_variants), len(cache_variants), out), out, as_json)
        return
    if decodings is not None:
        from trimtab.app.decoding_comparison import DecodingSetting, plan_decodings, run_decodings

        for option, given in (("--bits", bits), ("--tasks", tasks), ("--text", text)):
            if given is not None:
                raise ConfigError(f"{option} is not for --decodings.")
        decoding_variants = plan_decodings(split_names(decodings, "--decodings"), read_settings(settings))
        check_output(out, force, holds="runs")
        decoding_setting = DecodingSetting(model, limit, seed=seed, device=device)
        done = record(run_decodings(decoding_setting, decoding_variants), len(decoding_variants), out)
        _finish(model, done, out, as_json)
        return
    assert methods is not None
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
        mode=named(mode),
        seed=seed,
        device=device,
    )
    _finish(model, record(run_all(setting, variants), len(variants), out), out, as_json)


def _finish(model: str, records: Sequence[RunRecord], out: Path, as_json: bool) -> None:
    if as_json:
        emit_json([record.to_dict() for record in records])
    else:
        show(*comparison_tables(model, records))
    say(f"Report: {out / 'report.html'}   records: {out / 'runs'}")


def record(runs: Iterator[RunRecord], count: int, out: Path) -> list[RunRecord]:
    """Run a comparison of `count` rows, say how it goes, save records and report: of finished rows if one fails."""
    from trimtab.app.comparison import save_records
    from trimtab.app.report.page import write_report

    records: list[RunRecord] = []
    try:
        for done in save_records(runs, out):
            records.append(done)
            taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
            say(f"[{len(records)}/{count}] {done.config['label']}: {taken}")
    finally:
        if records:
            write_report(out / "runs")
    return records


def comparison_tables(model: str, records: Sequence[RunRecord]) -> list[Table]:
    """The terminal's form of the report's table."""
    from trimtab.app.report.view import view_of

    view = view_of(records, pictures=False)
    rows = [(line.label, *("\n".join(part for part in cell if part) for cell in line.cells)) for line in view.lines]
    return wide_table(f"{model}: brackets hold 95 % intervals", view.columns, rows)
