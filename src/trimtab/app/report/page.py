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
from trimtab.app.report.figures import pareto_svg
from trimtab.app.report.rows import Row, load_records, main_metrics, row_of
from trimtab.core.files import write_text_atomically
from trimtab.core.run_record import RunRecord

GLOSSARY = (
    ("at rest", "bytes of all tensors as saved: codes, scales, zero points, and everything left uncompressed"),
    ("kept", "bytes at rest as a fraction of the uncompressed model's"),
    ("bits / weight", "bits per weight in the compressed layers, everything they store included"),
    ("bits / byte", "bits the model needs per byte of held-out prose; smaller is better"),
    ("KL", "nats per token by which next-token distributions differ from the uncompressed model's; smaller is better"),
    ("tasks", "share of held-out instances answered rightly unless the column says otherwise"),
    ("tokens/s", "tokens decoded per second at batch size 1, median"),
    ("compress", "time to compress, calibration included"),
)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Headers of the table, the label first."""
    tasks = [f"{task} {metric.replace('_', ' ')}" for task, metric in main_metrics(rows)]
    return ["method", "at rest", "kept", "bits / weight", "bits / byte", "KL", *tasks, "tokens/s", "compress"]


def cells_of(row: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(text, interval) of each column after the label."""
    measured = [row.bits_per_byte, row.kl, *(row.tasks.get(key) for key in main_metrics(rows))]
    speed = row.tokens_per_second
    return [
        (text.size(row.bytes_at_rest), ""),
        (f"{row.keep_fraction:.3f}", ""),
        (text.NOTHING if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}", ""),
        *((text.point(value), text.bounds(value)) for value in measured),
        (text.NOTHING if speed is None else text.number(speed.value), ""),
        (text.seconds(row.compress_seconds), ""),
    ]


def _pictures(rows: Sequence[Row]) -> list[dict[str, str]]:
    kl = pareto_svg(rows, lambda row: row.kl, "KL to the uncompressed model (nats per token)", logarithmic=True)
    prose = pareto_svg(rows, lambda row: row.bits_per_byte, "bits per byte of held-out prose", logarithmic=False)
    pictures = [
        {"svg": kl, "caption": "Distance from the uncompressed model, on a logarithmic scale. Lower left is better."},
        {
            "svg": prose,
            "caption": "Quality as a language model. Lower left is better; the dotted line is uncompressed.",
        },
    ]
    return [picture for picture in pictures if picture["svg"]]


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    machine = dict(record.machine)
    memory = machine.pop("memory_bytes", None)
    facts = [(str(k), str(v)) for k, v in machine.items()]
    if memory:
        facts.append(("memory", text.size(memory)))
    return facts + [(name, version) for name, version in record.versions.items()]


def render(records: Sequence[RunRecord]) -> str:
    """The HTML of a comparison. The order of the rows is that of the records."""
    rows = [row_of(record) for record in records]
    first = records[0]
    context: dict[str, Any] = {
        "title": f"{first.config.get('model', 'model')}: what compression cost",
        "started": first.started.replace("T", " ").replace("+00:00", " UTC"),
        "machine": first.machine,
        "version": trimtab.__version__,
        "pictures": _pictures(rows),
        "columns": columns_of(rows),
        "rows": [
            {
                "label": row.label,
                "baseline": row.baseline,
                "cells": [{"text": shown, "bounds": bounds} for shown, bounds in cells_of(row, rows)],
            }
            for row in rows
        ],
        "glossary": GLOSSARY,
        "samples": [
            {"label": row.label, **sample}
            for row, record in zip(rows, records, strict=True)
            for sample in record.metrics.get("samples", [])
        ],
        "records": [
            {
                "label": row.label,
                "seed": record.seed,
                "changed": len(record.changed),
                "unchanged": len(record.unchanged),
                "json": json.dumps(record.to_dict(), indent=2, sort_keys=True),
            }
            for row, record in zip(rows, records, strict=True)
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
