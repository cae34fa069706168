"""All cache methods on one model in three conditions: the work behind the committed results of the cache room.

plain              the model as it is, held-out prose; recall by distance too
outliers           function-preserving outlier channels injected, as large models have them (see outliers.py)
calibration text   read on the text that calibrated methods are fitted on: what they gain on it they have not learnt

The model runs in float32, so that rounding of the model does not pass for error of the cache; bits are counted with
keys and values in bfloat16, as models are served.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError
from trimtab.evaluation.caches.measure import CacheReference, measure_cache
from trimtab.evaluation.caches.named import cache_class, cache_method, cache_names
from trimtab.evaluation.caches.recall import SETTINGS
from trimtab.evaluation.outliers import inject_outliers
from trimtab.models import info_of, load

BITS = (2, 4)
SETTINGS_OF: Mapping[str, Sequence[dict[str, object]]] = {
    "auto": ({"bits_per_element": 2.5}, {"bits_per_element": 3.5}),
    "cq": ({"channels": 8},),
    "gear": ({"bits": 2},),
    "gear_l": ({"bits": 2},),
    "kvquant": ({"bits": 2}, {"bits": 3}, {"bits": 4}),
    "retrieval_heads": ({"full_fraction": 0.25},),
}
"""Methods whose bits per element are not an option `bits`, or for which other settings tell more."""
CONDITIONS = ("plain", "outliers", "calibration text")


def survey_options(bits: Sequence[int] = BITS) -> list[tuple[str, dict[str, object]]]:
    """The settings of SETTINGS_OF; else each method at each number of bits that it takes, or with its defaults."""
    found: list[tuple[str, dict[str, object]]] = []
    for name in cache_names():
        own = list(SETTINGS_OF.get(name, ())) or [{"bits": count} for count in bits if _accepts(name, count)]
        found += [(name, dict(options)) for options in own or [{}]]
    return found


def _accepts(name: str, bits: int) -> bool:
    if "bits" not in {f.name for f in dataclasses.fields(cache_class(name))}:
        return False
    try:
        cache_method(name, {"bits": bits})
    except ConfigError:
        return False
    return True


@functools.cache
def _subject(model: str, condition: str, small: bool) -> tuple[PreTrainedModel, CacheReference]:
    """The model in a condition and what caches are measured against there; once per process."""
    subject = load(model, dtype=torch.float32)
    if condition == "outliers":
        inject_outliers(subject, kind="activations")
    if condition == "calibration text":  # the same model, so what caches learn is the same
        info_of(subject).fitted_caches = info_of(_subject(model, "plain", small)[0]).fitted_caches
    with resources.as_file(resources.files("trimtab") / "assets" / "text" / "prose_calibration.txt") as file:
        text = file if condition == "calibration text" else None
        size: dict[str, Any] = {"windows": 4, "contexts": 3} if condition == "plain" else {"windows": 2, "contexts": 1}
        size["recall"] = SETTINGS if condition == "plain" else ()
        if small:
            size |= {"windows": 2, "contexts": 1, "questions": 2, "length": 256}
        return subject, CacheReference.of(subject, text=text, **size)


def _baseline(model: str, condition: str, small: bool) -> dict[str, Any]:
    subject, reference = _subject(model, condition, small)
    return reference.figures(subject)


def _entry(model: str, name: str, options: Mapping[str, object], small: bool) -> dict[str, Any]:
    method = cache_method(name, options)
    conditions = {}
    for condition in CONDITIONS:
        subject, reference = _subject(model, condition, small)
        conditions[condition] = measure_cache(subject, method, reference, bits_dtype=torch.bfloat16)
    bits = options.get("bits")
    others = ", ".join(f"{option}={value}" for option, value in options.items() if option != "bits")
    label = " ".join(part for part in (name, "" if bits is None else f"{bits}-bit", others) if part)
    return {"label": label, "method": name, "options": method.to_dict(), "conditions": conditions}


def _one_thread() -> None:
    torch.set_num_threads(1)


def survey(
    model: str = "ref",
    options: Sequence[tuple[str, Mapping[str, object]]] | None = None,
    *,
    processes: int = 2,
    small: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`{"baseline": {condition: figures}, "entries": [{label, method, options, conditions}]}`, all JSON values.

    options     (method, its options); None: `survey_options()`
    processes   methods measured at a time, each with one thread
    small       short texts and few questions, to try it out
    """
    asked = survey_options() if options is None else options
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        baseline = {condition: pool.submit(_baseline, model, condition, small) for condition in CONDITIONS}
        futures = [pool.submit(_entry, model, name, dict(own), small) for name, own in asked]
        entries = []
        for future in futures:
            entries.append(future.result())
            tell(f"[{len(entries)}/{len(futures)}] {entries[-1]['label']}")
        return {"baseline": {name: future.result() for name, future in baseline.items()}, "entries": entries}
