"""The run: target, draft and prompts once, one process per system, one entry per system."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import models
from trimtab.core.files import write_text_atomically
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.beside.run import run_systems
from trimtab.evaluation.decoding_speed.measure import Setting, demand_same
from trimtab.evaluation.decoding_speed.sessions import DRAFT, PROMPTS_FILE, TARGET
from trimtab.evaluation.decoding_speed.widened import widen
from trimtab.evaluation.kl import window_tokens
from trimtab.models import tokenizer_of

LEAST_SAME = 0.2
"""Share of tokens that must be those of the first system. In bfloat16 texts part at near ties, which passes over other
numbers of tokens round differently; a system that decodes something else parts at once."""


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run_systems`: one entry per system with the figures of `measure`, and

    same_text   share of the tokens that are those of the first system, up to the first difference of each text
    """
    expected: list[list[list[int]]] = []

    def make(folder: Path, _: Sequence[System]) -> None:
        tell(f"making the target: ref with {setting.million_weights} million weights more")
        make_models(folder, setting)

    def finish(figures: dict[str, Any], _: float) -> list[dict[str, Any]]:
        texts = figures.pop("texts")
        expected.append(texts)
        return [figures | {"same_text": demand_same(texts, expected[0], LEAST_SAME)}]

    return run_systems(systems, setting, make, finish, threads=threads, tell=tell)


def make_models(folder: Path, setting: Setting) -> None:
    """Write target, draft and prompts into the folder."""
    target = models.load("ref", dtype=torch.bfloat16)
    tokenizer = tokenizer_of(target)
    windows = window_tokens(target, tokenizer, None, max(2, setting.prompts), setting.prompt - 1, setting.seed)
    widen(target, setting.million_weights * 1_000_000, seed=setting.seed)
    models.save(target, folder / TARGET)
    models.save(models.load("ref-mini", dtype=torch.bfloat16), folder / DRAFT)
    write_text_atomically(folder / PROMPTS_FILE, json.dumps(windows[: setting.prompts].tolist()))
