"""Measure several cache methods on one model: the work behind `trimtab compare --caches`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trimtab.app.cli.options import typed_settings
from trimtab.app.comparison import UNCOMPRESSED, check_prefixes, own_settings
from trimtab.core.run_record import RunRecord
from trimtab.evaluation.caches.named import cache_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.cache.base import CacheMethod
    from trimtab.evaluation.base import TaskResult
    from trimtab.evaluation.caches import CacheReference

KIND = "caches"
WINDOWS, LENGTH, CONTEXTS, QUESTIONS = 6, 2048, 4, 16
SPEED_PROMPT, SPEED_TOKENS = 1024, 16


@dataclass(frozen=True, slots=True)
class CacheVariant:
    """One row: how keys and values are kept. No method: as transformers keeps them."""

    label: str
    method: CacheMethod | None = None

    @property
    def name(self) -> str | None:
        return None if self.method is None else type(self.method).name()


@dataclass(frozen=True, slots=True)
class CacheSetting:
    """What is the same for all rows.

    model   any name that `trimtab.load` takes
    tasks   names of evaluation tasks, beside what is always measured of a cache
    limit   most windows of text, most questions of a recall setting, most documents of a task
    """

    model: str
    tasks: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    device: str | None = None


def plan_caches(names: Sequence[str], bits: Sequence[int], settings: Mapping[str, str]) -> list[CacheVariant]:
    """The model as it is, then each cache at each number of bits; once if it has no option `bits`.

    A setting `option` goes to all caches, a setting `cache.option` to one. Raises ConfigError for what a cache does not
    have or accept, before anything runs.
    """
    classes = {cls.name(): cls for cls in map(cache_class, names)}
    check_prefixes(list(classes), settings)
    variants = [CacheVariant(UNCOMPRESSED)]
    for name, cls in classes.items():
        takes_bits = "bits" in {f.name for f in dataclasses.fields(cls)}
        for count in bits if takes_bits and bits else (None,):
            method = cls.from_options(typed_settings(cls, own_settings(cls, name, settings, count)))
            chosen = getattr(method, "bits", None)
            variants.append(CacheVariant(name if chosen is None else f"{name} {chosen}-bit", method))
    return variants


def run_caches(setting: CacheSetting, variants: Sequence[CacheVariant]) -> Iterator[RunRecord]:
    """Measure each variant; yields its record when it is done. The first must be the model as it is."""
    import trimtab as tt

    model = tt.load(setting.model, device=setting.device)
    for variant in variants[1:]:
        assert variant.method is not None
        variant.method.new(model)  # refuses what does not fit this model before the first hour is spent
    reference: CacheReference | None = None
    results: Mapping[str, TaskResult] | None = None
    for variant in variants:
        record = RunRecord(command="compare", config=_config(setting, variant), seed=setting.seed)
        if reference is None:
            reference = _reference(model, setting, record)
            record.metrics |= reference.figures(model)
        else:
            _measure(model, variant, reference, record)
        results = _tasks(model, setting, variant, record, results)
        _speed(model, variant, record)
        yield record


def _reference(model: PreTrainedModel, setting: CacheSetting, record: RunRecord) -> CacheReference:
    from trimtab.evaluation.caches import CacheReference

    limit = setting.limit or WINDOWS
    with record.timed("evaluate"):
        return CacheReference.of(
            model,
            windows=max(2, min(WINDOWS, limit)),
            length=LENGTH,
            contexts=CONTEXTS if setting.limit is None else -(-min(limit, CONTEXTS * QUESTIONS) // QUESTIONS),
            questions=min(QUESTIONS, setting.limit or QUESTIONS),
            seed=setting.seed,
        )


def _measure(model: PreTrainedModel, variant: CacheVariant, reference: CacheReference, record: RunRecord) -> None:
    from trimtab.evaluation.caches import measure_cache

    assert variant.method is not None
    with record.timed("evaluate"):
        record.metrics |= measure_cache(model, variant.method, reference)


def _tasks(
    model: PreTrainedModel,
    setting: CacheSetting,
    variant: CacheVariant,
    record: RunRecord,
    reference: Mapping[str, TaskResult] | None,
) -> Mapping[str, TaskResult] | None:
    """Task metrics, if tasks were asked for; returns the results of the model as it is."""
    if not setting.tasks:
        return None
    from trimtab.evaluation import evaluate, to_json

    with record.timed("evaluate"):
        results = evaluate(
            model, setting.tasks, limit=setting.limit, seed=setting.seed, reference=reference, cache=variant.method
        )
    record.metrics |= to_json(results)
    record.metrics["main_metrics"] = [[name, next(iter(result.metrics))] for name, result in results.items()]
    return reference or results


def _speed(model: PreTrainedModel, variant: CacheVariant, record: RunRecord) -> None:
    from trimtab.evaluation.probes import measure_speed

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompt = SPEED_PROMPT if context is None else min(SPEED_PROMPT, max(1, context - SPEED_TOKENS))
    with record.timed("speed"):
        speed = measure_speed(model, prompt_tokens=prompt, new_tokens=SPEED_TOKENS, repeats=3, cache=variant.method)
    record.metrics["speed"] = speed.to_dict()


def _config(setting: CacheSetting, variant: CacheVariant) -> dict[str, Any]:
    options = None if variant.method is None else variant.method.to_dict()
    bits = None if options is None else options.get("bits")
    own = {"kind": KIND, "label": variant.label, "method": variant.name, "bits": bits, "options": options}
    return own | asdict(setting) | {"tasks": list(setting.tasks)}
