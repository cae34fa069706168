"""`trimtab export MODEL --format FORMAT -o OUT`: a compressed model for vLLM, transformers, llama.cpp or PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.app.cli.options import AsJson, Force, Model, Settings, check_output, read_settings, typed_settings
from trimtab.app.cli.output import emit_json, show, table
from trimtab.app.report import text as figures

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.models.exports import Exported

EXAMPLES = (
    "trimtab export ref-gptq4 --format compressed-tensors -o ref-packed",
    "trimtab export ref-gptq4 --format gguf -o ref.gguf",
    "trimtab export ref-gptq4 --format gguf --set type=q8_0 --set dense=f16 -o ref-q8.gguf",
    "trimtab export ref-loftq --format peft --set alpha=16 -o ref-adapter",
)


def run(
    model: Model,
    format: Annotated[
        str, typer.Option("--format", "-f", help="compressed-tensors, gptq, gguf or peft.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory, or for gguf the file.", show_default=False)],
    settings: Settings = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a compressed model in a format that other libraries read.

    Codes and scales carry over as they are where the format can hold them. A layer that it cannot hold is refused by
    name, before anything is written.
    """
    from trimtab.models.exports import check_path, format_class

    chosen = format_class(format)
    options = typed_settings(chosen, read_settings(settings))
    fmt = chosen.from_options(options)
    check_path(fmt, out, force=force)
    if fmt.marker is not None:
        check_output(out, force, holds=fmt.marker)

    import trimtab as tt

    done = tt.export(tt.load(model), out, format=format, force=force, **options)
    if as_json:
        written = {"path": str(done.path), "format": done.format, "nbytes": done.nbytes, "layers": done.layers}
        emit_json({"model": model, "options": fmt.to_dict(), **written})
        return
    show(_table(done), f"\nWrote {done.path}, {figures.size(done.nbytes)}.")


def _table(done: Exported) -> Table:
    rows = []
    for kind in dict.fromkeys(entry["stored_as"] for entry in done.layers):
        own = [entry for entry in done.layers if entry["stored_as"] == kind]
        worst = max(own, key=lambda entry: entry["relative_error"])
        error = worst["relative_error"]
        rows.append(
            (kind, str(len(own)), figures.number(error) if error else "0", worst["layer"] if error else figures.NOTHING)
        )
    columns = ("stored as", "layers", "largest relative error of rounding", "where")
    return table(f"Exported as {done.format}", columns, rows, right=columns[1:3])
