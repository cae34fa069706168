"""Methods that keep the KV cache: honest bits, what is lost, what is still recalled, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.app.report import text
from trimtab.app.report.figures import pareto_svg
from trimtab.app.report.rows import Interval
from trimtab.app.report.view import Cell, Line, View
from trimtab.core.errors import DataError
from trimtab.core.run_record import RunRecord

KIND = "caches"
_COST = "bits per element of keys and values"
GLOSSARY = (
    ("bits / element", "allocated bits per number of a key or value read: codes, scales, windows, unfilled room, all"),
    ("encoded", "bits per element of what has left the exact windows, allocated"),
    ("cache", "bytes allocated after one window of text, batch size 1"),
    (
        "KL",
        "nats per token by which next-token distributions differ from those without a cache, over whole windows",
    ),
    ("bits / byte", "bits the model needs per byte of held-out prose, read through the cache; smaller is better"),
    ("words, codes", "share of values recalled when so many tokens of prose lie between records and questions"),
    (
        "output error",
        "relative error of attention outputs with the model's own queries; mean of layers",
    ),
    (
        "K error, V error",
        "relative error of keys and values held, exact window included; evicted ones are zeros",
    ),
    ("tokens/s", "tokens decoded per second at batch size 1, median; the context is in the run records"),
)


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One run. recall and tasks: label -> share or score; numbers that were not measured are None."""

    label: str
    method: str
    baseline: bool
    bits: float | None
    encoded: float | None
    nbytes: int | None
    kl: Interval | None
    bits_per_byte: Interval | None
    output_error: float | None
    keys_error: float | None
    values_error: float | None
    tokens_per_second: float | None
    recall: Mapping[str, Interval] = field(default_factory=dict)
    tasks: Mapping[str, Interval] = field(default_factory=dict)


def cache_row(metrics: Mapping[str, Any], label: str, method: str | None) -> CacheRow:
    """The row of what `evaluation.caches.measure_cache` found, or of the model without a cache (method None)."""
    bits, attention = metrics.get("bits", {}), metrics.get("attention", {})
    divergence = metrics.get("divergence", {})
    recall = {name: Interval.of(data) for name, data in metrics.get("recall", {}).items()}
    tasks = {
        f"{task} {metric.replace('_', ' ')}": Interval.of(metrics.get("tasks", {}).get(task, {}).get(metric))
        for task, metric in metrics.get("main_metrics", [])
    }
    return CacheRow(
        label=label,
        method=method or "none",
        baseline=method is None,
        bits=bits.get("bits"),
        encoded=bits.get("encoded"),
        nbytes=bits.get("nbytes"),
        kl=Interval.of(divergence.get("kl_nats_per_token")),
        bits_per_byte=Interval.of(divergence.get("bits_per_byte")),
        output_error=attention.get("output"),
        keys_error=attention.get("keys"),
        values_error=attention.get("values"),
        tokens_per_second=metrics.get("speed", {}).get("decode_tokens_per_second_median"),
        recall={name: found for name, found in recall.items() if found is not None},
        tasks={name: found for name, found in tasks.items() if found is not None},
    )


def columns_of(rows: Sequence[CacheRow]) -> list[str]:
    """Headers of the table, the label first."""
    measured = ["KL", "bits / byte", *_names(rows)]
    errors = ["output error", "K error", "V error"]
    return ["cache", "bits / element", "encoded", "cache bytes", *measured, *errors, "tokens/s"]


def cells_of(row: CacheRow, rows: Sequence[CacheRow]) -> list[Cell]:
    """(text, interval) of each column after the label."""
    shares = {**row.recall, **row.tasks}
    measured = [row.kl, row.bits_per_byte, *(shares.get(name) for name in _names(rows))]
    return [
        (_fixed(row.bits), ""),
        (_fixed(row.encoded), ""),
        (text.NOTHING if row.nbytes is None else text.size(row.nbytes), ""),
        *((text.point(value), text.bounds(value)) for value in measured),
        *((text.number(value), "") for value in (row.output_error, row.keys_error, row.values_error)),
        (text.number(row.tokens_per_second), ""),
    ]


def _names(rows: Sequence[CacheRow]) -> list[str]:
    """Recall settings, then tasks, in the order in which they were measured."""
    recall = dict.fromkeys(name for row in rows for name in row.recall)
    return list(recall | dict.fromkeys(name for row in rows for name in row.tasks))


def _fixed(bits: float | None) -> str:
    return text.NOTHING if bits is None else f"{bits:.2f}"


def _pictures(rows: Sequence[CacheRow]) -> list[dict[str, str]]:
    measured = [row for row in rows if row.bits is not None]

    def cost(row: CacheRow) -> float:
        assert row.bits is not None
        return row.bits

    def output(row: CacheRow) -> Interval | None:
        return None if row.output_error is None else Interval(row.output_error)

    made = [
        (
            pareto_svg(
                measured,
                lambda row: row.kl,
                "KL to the model without a cache (nats per token)",
                cost=cost,
                cost_label=_COST,
                logarithmic=True,
            ),
            "Distance from the model without compression, on a logarithmic scale. Lower left is better.",
        ),
        (
            pareto_svg(measured, output, "error of attention outputs", cost=cost, cost_label=_COST, logarithmic=True),
            "Relative error of attention outputs with the model's own queries. Lower left is better.",
        ),
    ]
    return [{"svg": svg, "caption": caption} for svg, caption in made if svg]


def view(records: Sequence[RunRecord], *, pictures: bool) -> View:
    """Records of `trimtab compare --caches`."""
    for record in records:
        if record.command != "compare" or record.config.get("kind") != KIND:
            raise DataError(f"a run record of '{record.command}' is not one of a comparison of caches.")
    rows = [cache_row(record.metrics, record.config["label"], record.config["method"]) for record in records]
    return View(
        columns=tuple(columns_of(rows)),
        lines=tuple(Line(row.label, row.baseline, tuple(cells_of(row, rows))) for row in rows),
        pictures=tuple(_pictures(rows)) if pictures else (),
        glossary=GLOSSARY,
    )
