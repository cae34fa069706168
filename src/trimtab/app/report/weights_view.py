"""Methods that change the weights: bytes at rest, quality, tasks, speed."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.app.report import text
from trimtab.app.report.figures import pareto_svg
from trimtab.app.report.rows import Row, main_metrics, row_of
from trimtab.app.report.view import Cell, Line, View
from trimtab.core.run_record import RunRecord

_COST = "bytes at rest (MB)"
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


def cells_of(row: Row, rows: Sequence[Row]) -> list[Cell]:
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
    kl = pareto_svg(
        rows,
        lambda row: row.kl,
        "KL to the uncompressed model (nats per token)",
        cost=_megabytes,
        cost_label=_COST,
        logarithmic=True,
    )
    prose = pareto_svg(
        rows,
        lambda row: row.bits_per_byte,
        "bits per byte of held-out prose",
        cost=_megabytes,
        cost_label=_COST,
        logarithmic=False,
    )
    pictures = [
        {"svg": kl, "caption": "Distance from the uncompressed model, on a logarithmic scale. Lower left is better."},
        {
            "svg": prose,
            "caption": "Quality as a language model. Lower left is better; the dotted line is uncompressed.",
        },
    ]
    return [picture for picture in pictures if picture["svg"]]


def _megabytes(row: Row) -> float:
    return row.bytes_at_rest / 1e6


def view(records: Sequence[RunRecord], *, pictures: bool) -> View:
    """Records of `trimtab compare --methods`."""
    rows = [row_of(record) for record in records]
    return View(
        columns=tuple(columns_of(rows)),
        lines=tuple(Line(row.label, row.baseline, tuple(cells_of(row, rows))) for row in rows),
        pictures=tuple(_pictures(rows)) if pictures else (),
        glossary=GLOSSARY,
    )
