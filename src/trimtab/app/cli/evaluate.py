"""`trimtab evaluate MODEL`: what the model can do, with intervals, alone or against another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.app.cli.options import (
    AsJson,
    Cache,
    CacheSettings,
    Device,
    Model,
    Seed,
    check_text,
    read_cache,
    split_names,
)
from trimtab.app.cli.output import emit_json, show, table
from trimtab.app.report import text as figures
from trimtab.app.report.rows import Interval

if TYPE_CHECKING:
    from trimtab.evaluation.base import TaskResult

EXAMPLES = (
    "trimtab evaluate ref --tasks prose,recall --limit 50",
    "trimtab evaluate ref-gptq4 --reference ref --json",
    "trimtab evaluate ref --tasks prose --text my-text.txt",
    "trimtab evaluate ref --cache kivi --cache-set bits=2 --reference ref",
)
Tasks = Annotated[
    str | None, typer.Option(help="Names separated by commas; without it, all tasks.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Most documents per task.", show_default="each task's own")]


def checked_tasks(tasks: str | None) -> list[str]:
    """Task names. Raises ConfigError with a suggestion for an unknown one, without loading a model."""
    from trimtab.evaluation import task, task_names

    if tasks is None:
        return list(task_names())
    names = split_names(tasks, "--tasks")
    for name in names:
        task(name)
    return names


def run(
    model: Model,
    tasks: Tasks = None,
    limit: Limit = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model on the same documents.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text for the task prose instead of ours.", show_default=False)
    ] = None,
    cache: Cache = None,
    cache_settings: CacheSettings = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a model can do, with 95 % intervals.

    With --cache, texts are read in chunks, so that what the cache loses is seen; the reference has no cache.
    """
    names = checked_tasks(tasks)
    check_text(text)
    method = read_cache(cache, cache_settings)

    import trimtab as tt
    from trimtab.evaluation import to_json

    started = time.perf_counter()
    loaded = tt.load(model, device=device)
    other = None if reference is None else tt.load(reference, device=device)
    results = tt.evaluate(loaded, names, limit=limit, seed=seed, reference=other, text=text, cache=method)
    if as_json:
        seconds = time.perf_counter() - started
        kept = None if method is None else {"method": type(method).name(), **method.to_dict()}
        told = {"model": model, "reference": reference, "cache": kept, "seed": seed, "seconds": seconds}
        emit_json({**told, **to_json(results)})
        return
    rows = [row for result in results.values() for row in _rows(result)]
    show(
        table(model, ("task", "metric", "value", "95 % interval", "documents", ""), rows, right=("value", "documents"))
    )
    if reference is not None:
        compared = [row for result in results.values() for row in _compared(result)]
        columns = ("task", "metric", "difference", "95 % interval", "recovery", "p (Holm)")
        show(table(f"against {reference}", columns, compared, right=("difference", "recovery", "p (Holm)")))


def _rows(result: TaskResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, estimate in result.metrics.items():
        value = Interval.of(estimate.to_dict())
        better = "" if result.higher_is_better.get(metric, True) else "smaller is better"
        rows.append((result.task, metric, figures.point(value), figures.bounds(value), str(estimate.n), better))
    return rows


def _compared(result: TaskResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for entry in result.comparisons:
        difference = Interval.of(entry.difference.to_dict())
        recovery = None if entry.recovery is None else Interval(entry.recovery.value)
        shown = (figures.point(difference), figures.bounds(difference), figures.point(recovery))
        rows.append((entry.task, entry.metric, *shown, figures.number(entry.p_holm)))
    return rows
