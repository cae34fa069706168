"""`trimtab plan SOURCE`: what was removed, from a plan file or a pruned model; with another one, how they differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, table
from trimtab.core.errors import OutputError

if TYPE_CHECKING:
    from trimtab.weights._pruning.plan import Plan

EXAMPLES = (
    "trimtab plan ref-wanda50",
    "trimtab plan ref-wanda50 -o wanda50.safetensors",
    "trimtab plan wanda50.safetensors --against ref-sparsegpt50",
)

_SOURCE = "A plan file, or a pruned model."


def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE, show_default=False)],
    against: Annotated[str | None, typer.Option("--against", help=f"{_SOURCE} Show only where it differs.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which units of which layers were kept: entries, n of m, neurons, heads, layers.

    A plan file holds decisions and no weights; it can be applied to another copy of the model.
    """
    if out is not None and out.exists():
        raise OutputError(f"{out} is there already; choose another name, or remove it.")
    plan = _read(source)
    if out is not None:
        plan.save(out)
    cells: list[tuple[str, ...]]
    if against is not None:
        differences = plan.diff(_read(against))
        rows: list[dict[str, Any]] = [
            {"name": d.name, "kind": d.kind, "only_first": d.only_first, "only_second": d.only_second, "both": d.both}
            for d in differences
        ]
        heading, columns = f"Units that {source} and {against} keep", ("only the first", "only the second", "both")
        cells = [(d.name, d.kind, f"{d.only_first:,}", f"{d.only_second:,}", f"{d.both:,}") for d in differences]
    else:
        rows = plan.table()
        heading, columns = f"Units that {source} keeps", ("units", "kept", "share")
        cells = [(r["name"], r["kind"], f"{r['units']:,}", f"{r['kept']:,}", f"{r['kept_fraction']:.3f}") for r in rows]
    if as_json:
        emit_json({"source": source, "against": against, "budget": dict(plan.budget), "entries": rows})
        return
    message = f"{len(rows)} entries." if rows else "No difference." if against else "Nothing was removed."
    show(table(heading, ("layer", "units of", *columns), cells, right=columns), message)


def _read(source: str) -> Plan:
    from trimtab.weights._pruning.plan import Plan

    if Path(source).is_file():
        return Plan.load(source)
    import trimtab as tt

    return Plan.of_model(tt.load(source))
