"""The run: the model and its logits once, one process per system, one entry per system."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import models
from trimtab.core.errors import NumericsError
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.beside.run import read_speed, run_systems
from trimtab.evaluation.kv_decode._run import make_model
from trimtab.evaluation.weight_decode.llama_cpp import BASE_TYPE
from trimtab.evaluation.weight_decode.measure import Setting

LEAST_AGREEMENT = 0.2
"""Cosine between the logits and those of the uncompressed model that every system without a reference of its own has to
reach. On random weights, formats of 4 bits are above 0.9 and those of 2 bits near 0.5; who reads other tokens or other
weights is within 0.06 of 0."""


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run_systems`: one entry per system with the figures of `measure`, and

    agreement         cosine between the logits after the context and the uncompressed model's
    read_gbps_median, bandwidth_share    bytes of weights that a step reads / its time, beside the measured bandwidth

    A system that computes something else has "error".
    """
    expected: list[float] = []

    def make(folder: Path, chosen: Sequence[System]) -> None:
        gguf = any(system.library == "llama.cpp" for system in chosen)
        make_model(folder, setting, gguf=gguf, gguf_type=BASE_TYPE, tell=tell)
        expected.extend(dense_logits(folder, setting))

    def finish(figures: dict[str, Any], bandwidth_gbps: float) -> list[dict[str, Any]]:
        cosine = agreement(figures.pop("logits"), expected, demanded=figures["parity"] is None)
        speed = read_speed(figures["read_bytes"], figures["decode_ms_median"], bandwidth_gbps)
        return [{**figures, "agreement": cosine, **speed}]

    return run_systems(systems, setting, make, finish, threads=threads, tell=tell)


def dense_logits(directory: Path, setting: Setting) -> list[float]:
    """Of the uncompressed model, after the context."""
    model = models.load(directory)
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([setting.tokens()[: setting.context]]), logits_to_keep=1)
    return [float(value) for value in output.logits[0, -1].float()]


def agreement(found: Sequence[float], expected: Sequence[float], *, demanded: bool) -> float:
    """Cosine between two vectors of logits. Raises NumericsError if LEAST_AGREEMENT is demanded and not reached."""
    norms = math.hypot(*found) * math.hypot(*expected)
    cosine = sum(f * e for f, e in zip(found, expected, strict=True)) / norms if norms else math.nan
    if demanded and not cosine >= LEAST_AGREEMENT:  # NaN is red too
        raise NumericsError(
            f"the cosine between the logits and those of the uncompressed model is {cosine:.2g}, below "
            f"{LEAST_AGREEMENT}: this system does not compute the same model; its speed is not reported."
        )
    return cosine
