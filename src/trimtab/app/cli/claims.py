"""`trimtab claims [NAME]`: does each method do what its paper says, measured here?"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, say, show, table

EXAMPLES = ("trimtab claims", "trimtab claims gptq", "trimtab claims kivi gear --json")
DOES_NOT_HOLD = 3


def _figures(numbers: object) -> str:
    assert isinstance(numbers, dict)
    return "\n".join(f"{name} {value:.4g}" for name, value in numbers.items())


def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Methods; without any, all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the smallest honest experiment for each claim. Exits 3 if one does not hold."""
    from trimtab.claims import run_claims

    verdicts = list(run_claims(names or None))
    if as_json:
        emit_json([dataclasses.asdict(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            answer = "[green]holds[/green]" if verdict.holds else "[red]does not hold[/red]"
            show(f"[bold]{verdict.system}[/bold] {answer} ({verdict.seconds:.1f} s)")
            print(f"  claim       {verdict.claim}\n  experiment  {verdict.experiment}\n  paper       {verdict.paper}")
            rows = [(_figures(dict(verdict.measured)), _figures(dict(verdict.baseline)))]
            show(table("", ("measured", "baseline"), rows))
    failed = [verdict for verdict in verdicts if not verdict.holds]
    say(f"{len(verdicts) - len(failed)} of {len(verdicts)} claims hold.")
    if failed:
        raise typer.Exit(DOES_NOT_HOLD)
