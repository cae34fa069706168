"""From run records to the rows that the terminal and the page both show. Reads records only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval; low and high are None where it was measured without one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any] | float | None) -> Interval | None:
        if data is None:
            return None
        if isinstance(data, Mapping):
            return None if data.get("value") is None else cls(data["value"], data.get("low"), data.get("high"))
        return cls(float(data))


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a comparison.

    tasks   (task, metric) -> interval
    main    the metric to show of each task, in the order in which tasks were run
    """

    label: str
    method: str
    bits: int | None
    baseline: bool
    bytes_at_rest: int
    keep_fraction: float
    bits_per_weight: float | None
    bits_per_byte: Interval | None
    kl: Interval | None
    tasks: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    main: tuple[tuple[str, str], ...] = ()
    tokens_per_second: Interval | None = None
    compress_seconds: float | None = None


def row_of(record: RunRecord) -> Row:
    """The row of one record of `trimtab compare`. Raises DataError if the record is of another command."""
    if record.command != "compare" or "label" not in record.config:
        raise DataError(f"a run record of '{record.command}' is not one of a comparison.")
    tasks = {
        (task, metric): interval
        for task, metrics in record.metrics.get("tasks", {}).items()
        for metric, data in metrics.items()
        if (interval := Interval.of(data)) is not None
    }
    bits_per_byte = next((v for (_, metric), v in tasks.items() if metric == "bits_per_byte"), None)
    return Row(
        label=record.config["label"],
        method=record.config["method"] or "none",
        bits=record.config.get("bits"),
        baseline=record.config["method"] is None,
        bytes_at_rest=record.ledger["bytes_at_rest"],
        keep_fraction=record.ledger["keep_fraction"],
        bits_per_weight=record.ledger.get("bits_per_weight"),
        bits_per_byte=bits_per_byte,
        kl=Interval.of(record.metrics.get("fidelity", {}).get("kl_nats_per_token")),
        tasks=tasks,
        main=tuple((task, metric) for task, metric in record.metrics.get("main_metrics", [])),
        tokens_per_second=Interval.of(record.metrics.get("speed", {}).get("decode_tokens_per_second_median")),
        compress_seconds=record.seconds.get("compress"),
    )


def main_metrics(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (task, metric) columns: the main metric of each task, in the order in which tasks were run.

    Bits per byte has a column of its own and is left out.
    """
    shown = dict.fromkeys(key for row in rows for key in row.main)
    return [(task, metric) for task, metric in shown if metric != "bits_per_byte"]


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both coordinates (smaller is better in both), by the first coordinate."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def load_records(directory: Path) -> list[RunRecord]:
    """The records in `directory`, by file name. Raises DataError if there is none or one cannot be read."""
    files = sorted(directory.glob("*.json"))
    if not files:
        raise DataError(f"{directory} holds no run records (*.json). They come from: trimtab compare ... -o DIR")
    records = []
    for file in files:
        try:
            records.append(RunRecord.from_dict(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{file} is not a run record: {error}.") from None
    return records
