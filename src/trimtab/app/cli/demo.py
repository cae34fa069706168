"""`trimtab demo`: the shipped model compressed, measured and explained, offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trimtab.app.cli.compare import comparison_tables, record
from trimtab.app.cli.options import Force, check_output
from trimtab.app.cli.output import say, show

EXAMPLES = ("trimtab demo", "trimtab demo -o my-demo")
PROMPT = "The sun rose over the mountains, and"
NEXT = (
    "trimtab compress ref --method gptq --set bits=4 -o ref-gptq4",
    'trimtab generate ref-gptq4 -p "Once upon a time"',
    "trimtab evaluate ref-gptq4 --reference ref",
    "trimtab claims gptq",
    "trimtab list",
)


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the report.")] = Path("trimtab-demo"),
    force: Force = False,
) -> None:
    """Compress the shipped model, measure it and show what was lost: about a minute, offline."""
    check_output(out, force, holds="runs")
    from trimtab.app.comparison import Setting, plan, run_all

    started = time.perf_counter()
    say("The reference model 'ref' at 4, 3 and 2 bits: rounded (rtn), and with rounding errors passed on (gptq).")
    setting = Setting(
        "ref",
        ("prose", "recall", "facts"),
        limit=24,
        sequences=16,
        length=512,
        mode="dense",
        prompt=PROMPT,
        temperature=0.7,
    )
    variants = plan(("rtn", "gptq"), (4, 3, 2), {})
    records = record(run_all(setting, variants), len(variants), out)
    show(*comparison_tables("ref", records))
    show("The same prompt with the same random numbers, at temperature 0.7:", "")
    for done in records:
        if done.config["bits"] in (None, 4, 2):
            show(f"[bold]{done.config['label']}[/bold]")
            print(f"  {PROMPT}{done.metrics['samples'][0]['text'].rstrip()}\n")
    show(
        f"Took {time.perf_counter() - started:.0f} s. With pictures and records: [bold]{out / 'report.html'}[/bold]",
        "",
    )
    show("Try next:", *(f"  {command}" for command in NEXT))
