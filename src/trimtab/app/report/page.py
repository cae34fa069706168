"""The page: one HTML file that loads nothing, drawn from run records."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trimtab
from trimtab.app.report import text
from trimtab.app.report.rows import load_records
from trimtab.app.report.view import view_of
from trimtab.core.files import write_text_atomically
from trimtab.core.run_record import RunRecord


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    machine = dict(record.machine)
    memory = machine.pop("memory_bytes", None)
    facts = [(str(k), str(v)) for k, v in machine.items()]
    if memory:
        facts.append(("memory", text.size(memory)))
    return facts + [(name, version) for name, version in record.versions.items()]


def render(records: Sequence[RunRecord]) -> str:
    """The HTML of a comparison. The order of the rows is that of the records."""
    view = view_of(records)
    first = records[0]
    context: dict[str, Any] = {
        "title": f"{first.config.get('model', 'model')}: what compression cost",
        "started": first.started.replace("T", " ").replace("+00:00", " UTC"),
        "machine": first.machine,
        "version": trimtab.__version__,
        "pictures": view.pictures,
        "columns": view.columns,
        "rows": [
            {
                "label": line.label,
                "baseline": line.baseline,
                "cells": [{"text": shown, "bounds": bounds} for shown, bounds in line.cells],
            }
            for line in view.lines
        ],
        "glossary": view.glossary,
        "samples": [
            {"label": record.config["label"], **sample}
            for record in records
            for sample in record.metrics.get("samples", [])
        ],
        "records": [
            {
                "label": record.config["label"],
                "seed": record.seed,
                "changed": len(record.changed),
                "unchanged": len(record.unchanged),
                "json": json.dumps(record.to_dict(), indent=2, sort_keys=True),
            }
            for record in records
        ],
        "facts": _facts(first),
    }
    return str(_template().render(context))


@functools.cache
def _template() -> Any:
    import jinja2

    source = importlib.resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source)


def write_report(runs: str | Path, out: str | Path | None = None) -> Path:
    """Draw the records in directory `runs` into `out` (default: report.html beside the directory). Returns its path.

    Raises DataError if the directory holds no records of a comparison, OutputError if the page cannot be written.
    """
    runs = Path(runs)
    target = runs.parent / "report.html" if out is None else Path(out)
    write_text_atomically(target, render(load_records(runs)))
    return target
