"""The run: model and data once, one process per system, one entry per system."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import models
from trimtab.evaluation import weight_decode
from trimtab.evaluation.compress_time.measure import Setting
from trimtab.evaluation.compress_time.sessions import write_tokens
from trimtab.evaluation.kv_decode._run import make_model, measure_system
from trimtab.evaluation.kv_decode.systems import System
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.info import tokenizer_of


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One entry per system: {"bench", "system", "model", ...} with the figures of `measure`.

    threads   for every system; None: as many as this process may use
    tell      called with a line of progress per system

    A system that is not installed has "skipped" instead, with the reason; one that fails has "error", and the others
    go on.
    """
    count = threads or len(os.sched_getaffinity(0))
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-compress-") as name:
        folder = Path(name)
        tell(f"making the model: {setting.model}")
        make(folder, setting)
        for number, system in enumerate(systems, 1):
            entry: dict[str, Any] = {"bench": setting.bench, "system": system.name, "model": setting.model}
            if reason := system.absent():
                tell(f"{number}/{len(systems)} {system.name}: skipped: {reason}")
                entries.append({**entry, "skipped": reason})
                continue
            tell(f"{number}/{len(systems)} {system.name}")
            figures = measure_system(system, folder, setting, count)
            if "error" in figures:
                tell(f"{system.name} failed: {figures['error']}")
            entries.append({**entry, "threads": count, **figures})
    return entries


def make(folder: Path, setting: Setting) -> None:
    """Write the model and the calibration tokens into the folder."""
    if setting.model == "ref":
        model = models.load("ref")
        models.save(model, folder, force=True)
        text = CalibrationSet.from_text(
            None, tokenizer_of(model), sequences=setting.sequences, length=setting.length, seed=setting.seed
        )
        write_tokens(folder, text.tokens)
    else:
        sizes = weight_decode.Setting(seed=setting.seed, prompt=setting.length)
        make_model(folder, sizes, gguf=False)
        generator = torch.Generator().manual_seed(setting.seed)
        write_tokens(folder, torch.randint(sizes.vocabulary, (setting.sequences, setting.length), generator=generator))
