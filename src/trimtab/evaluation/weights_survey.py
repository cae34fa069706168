"""Methods that change weights or layers on one model: several seeds, with and without outlier channels, on two texts.

plain       the model as it is
outliers    function-preserving outlier channels injected into the activations, as large models have them

The model runs in float32. A seed draws the calibration text, the outlier channels and whatever a method draws; the
windows that are measured stay the same. Tasks are asked once, after the first run. Bytes are those
of the model with its dense parts in bfloat16, as it ships.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.core.ledger import Ledger
from trimtab.core.recipe import Recipe
from trimtab.evaluation._evaluate import evaluate
from trimtab.evaluation.kl import NextTokens, divergence
from trimtab.evaluation.outliers import inject_outliers
from trimtab.models import ledger_of, load, tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress

Runs = Sequence[tuple[str, int]]
"""(condition, seed) of each time that a method is run."""
SEQUENCES, LENGTH = 32, 256
WINDOWS = 12
TASKS = ("prose", "recall", "arithmetic")
DOCUMENTS = 50


def survey(
    settings: Sequence[tuple[str, Mapping[str, Any]]],
    model: str = "ref",
    *,
    runs: Runs = (("plain", 0), ("outliers", 0)),
    second_text: Path | None = None,
    tasks: Sequence[str] = TASKS,
    processes: int = 2,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`{"entries": [{label, method, options, runs: [{condition, seed, ...figures}]}]}`, all JSON values.

    settings       (method of the weights or the layers room, its options)
    runs           of every method; the tasks are asked after the first of them
    second_text    beside the held-out prose; never used to calibrate
    processes      methods measured at a time, each with one thread
    """
    calibration = {"sequences": SEQUENCES, "length": LENGTH}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        baseline = pool.submit(_uncompressed, model, tasks)
        futures = [pool.submit(_entry, model, n, dict(o), second_text, runs, tasks) for n, o in settings]
        entries = []
        for future in futures:
            entries.append(future.result())
            tell(f"[{len(entries)}/{len(futures)}] {entries[-1]['label']}")
        whole = baseline.result()
    return {"model": model, "windows": WINDOWS, "calibration": calibration, **whole, "entries": entries}


def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def _predictions(model: str, text: Path | None) -> NextTokens:
    return NextTokens.of(load(model, dtype=torch.float32), text=text, windows=WINDOWS)


def _entry(
    model: str,
    name: str,
    options: dict[str, Any],
    second_text: Path | None,
    asked: Runs,
    names: Sequence[str],
) -> dict[str, Any]:
    recipe = Recipe.from_dict({"steps": [{"method": name, **options}]}, source=name)
    runs = []
    tasks: dict[str, Any] = {}
    for condition, seed in asked:
        run, subject = _run(model, recipe, second_text, condition, seed)
        runs.append(run)
        tasks = tasks or _tasks(subject, names)
    shown = [f"{key}={value}" for key, value in options.items() if key != "bits"]
    bits = recipe.steps[0].options.get("bits")
    label = " ".join([name, *([] if bits is None else [f"{bits}-bit"]), ", ".join(shown)]).strip()
    return {"label": label, "method": name, "options": recipe.steps[0].options, "runs": runs, "tasks": tasks}


def _uncompressed(model: str, tasks: Sequence[str]) -> dict[str, Any]:
    whole = load(model, dtype=torch.float32)
    return {"uncompressed": _tasks(whole, tasks), "uncompressed_ledger": _ledger(whole).to_dict()}


def _tasks(subject: PreTrainedModel, tasks: Sequence[str]) -> dict[str, Any]:
    """The main metric of each task."""
    found = evaluate(subject, tasks, limit=DOCUMENTS)
    return {name: next(iter(result.metrics.values())).to_dict() for name, result in found.items()}


def _ledger(subject: PreTrainedModel) -> Ledger:
    """With dense parts in bfloat16."""
    return ledger_of(torch.nn.Module.bfloat16(copy.deepcopy(subject)))


def _run(
    model: str, recipe: Recipe, second_text: Path | None, condition: str, seed: int
) -> tuple[dict[str, Any], PreTrainedModel]:
    subject: PreTrainedModel = load(model, dtype=torch.float32)
    if condition == "outliers":
        inject_outliers(subject, kind="activations", seed=seed)
    text = CalibrationSet.from_text(None, tokenizer_of(subject), sequences=SEQUENCES, length=LENGTH, seed=seed)
    started = time.perf_counter()
    compress(subject, recipe, calibration=text, seed=seed, progress=False)
    seconds = time.perf_counter() - started
    texts = {"prose": None} | ({} if second_text is None else {"second_text": second_text})
    figures = {}
    for key, path in texts.items():
        moved = divergence(subject, _predictions(model, path)).estimates()
        figures[key] = {name: estimate.to_dict() for name, estimate in moved.items()}
    ledger = _ledger(subject)
    if recipe.steps[-1].room == "layers":  # which keeps all its values in the model's dtype, twice as large here
        wide = ledger_of(subject)
        halves = {name: getattr(wide, name) // 2 for name in ("bytes_at_rest", "bytes_read_per_token")}
        ledger = dataclasses.replace(ledger, **halves)
    figures_of_run = {
        "condition": condition,
        "seed": seed,
        "seconds": seconds,
        "bytes_at_rest": ledger.bytes_at_rest,
        "bytes_read_per_token": ledger.bytes_read_per_token,
        "macs_per_token": ledger.macs_per_token,
        "bits_per_weight": ledger.bits_per_weight,
        "texts": figures,
    }
    return figures_of_run, subject
