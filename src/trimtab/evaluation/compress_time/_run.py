"""The run: model and data once, one process per system, one entry per system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import models
from trimtab.evaluation import weight_decode
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.beside.run import run_systems
from trimtab.evaluation.compress_time.measure import Setting
from trimtab.evaluation.compress_time.sessions import write_tokens
from trimtab.evaluation.kv_decode._run import make_model
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.info import tokenizer_of


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run_systems`: one entry per system with the figures of `measure`."""

    def make(folder: Path, _: Sequence[System]) -> None:
        tell(f"making the model: {setting.model}")
        make_model_and_tokens(folder, setting)

    return run_systems(systems, setting, make, lambda figures, _: [figures], threads=threads, tell=tell)


def make_model_and_tokens(folder: Path, setting: Setting) -> None:
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
        # llmcompressor wants a tokenizer beside tokens; that of `ref` has as many
        tokenizer_of(models.load("ref")).save_pretrained(folder)
        generator = torch.Generator().manual_seed(setting.seed)
        write_tokens(folder, torch.randint(sizes.vocabulary, (setting.sequences, setting.length), generator=generator))
