"""Run several recipes on one model and record what each cost: the work behind `trimtab compare` and `trimtab demo`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.app.cli.options import typed_settings
from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.recipe import Recipe
from trimtab.core.registry import method_class, method_info
from trimtab.core.run_record import RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.evaluation import NextTokens
    from trimtab.evaluation.base import TaskResult

UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row: what is done to the model. No recipe: nothing."""

    label: str
    method: str | None = None
    bits: int | None = None
    recipe: Recipe | None = None


def plan(methods: Sequence[str], bits: Sequence[int], settings: Mapping[str, str]) -> list[Variant]:
    """The uncompressed model, then each method at each number of bits (without `bits`: with its own default).

    A setting `option` goes to all methods, a setting `method.option` to one. Raises ConfigError for what a method does
    not have or accept, before anything runs.
    """
    names = [method_info(name).name for name in methods]
    if caches := [name for name in names if method_info(name).room == "cache"]:
        raise ConfigError(f"{', '.join(caches)} keep the KV cache and change no weights; compare them with --caches.")
    check_prefixes(names, settings)
    variants = [Variant(UNCOMPRESSED)]
    for count in bits or (None,):
        for name in names:
            cls = method_class(name)
            own = own_settings(cls, name, settings, count)
            recipe = Recipe.from_dict({"steps": [{"method": name, **typed_settings(cls, own)}]}, source=name)
            chosen = recipe.steps[0].options.get("bits")
            label = name if chosen is None else f"{name} {chosen}-bit"
            variants.append(Variant(label, name, chosen, recipe))
    return variants


def own_settings(cls: type, name: str, settings: Mapping[str, str], bits: int | None) -> dict[str, str]:
    """The settings that go to one method: those without a prefix, its own, and the number of bits."""
    own = {k: v for k, v in settings.items() if "." not in k}
    own |= {k.partition(".")[2]: v for k, v in settings.items() if k.partition(".")[0] == name and "." in k}
    if bits is not None:
        if "bits" in own:
            raise ConfigError(f"--bits {bits} and --set bits={own['bits']} contradict each other.")
        if "bits" not in {f.name for f in dataclasses.fields(cls)}:
            raise ConfigError(f"method '{name}' has no option 'bits'. Compare it without --bits.")
        own["bits"] = str(bits)
    return own


def check_prefixes(names: Sequence[str], settings: Mapping[str, str]) -> None:
    """Raise ConfigError for a setting `method.option` of a method that is not compared."""
    for key in settings:
        prefix, dot, _ = key.partition(".")
        if dot and prefix not in names:
            raise ConfigError(f"--set {key}: '{prefix}' is not among the methods. {did_you_mean(prefix, names)}")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all rows of a comparison.

    model       any name that `trimtab.load` takes; loaded anew for each row
    tasks       names of evaluation tasks
    limit       most documents per task
    text        calibration text; None: the prose that comes with trimtab
    sequences   calibration sequences
    length      tokens of each; None: the model's context, at most 2,048
    mode        "sequential" or "dense" calibration; None: each method's own
    prompt      if given, each row continues it by `sample_tokens` tokens, drawn at `temperature` (0: the likeliest)
                with the same random numbers
    """

    model: str
    tasks: Sequence[str]
    limit: int | None = None
    text: Path | None = None
    sequences: int = 128
    length: int | None = None
    mode: Literal["sequential", "dense"] | None = None
    seed: int = 0
    device: str | None = None
    prompt: str | None = None
    sample_tokens: int = 60
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class _Baseline:
    """What later rows are measured against."""

    next_tokens: NextTokens
    results: Mapping[str, TaskResult]


def run_all(setting: Setting, variants: Sequence[Variant]) -> Iterator[RunRecord]:
    """Measure each variant; yields its record when it is done. The first must be the uncompressed model."""
    baseline = None
    for variant in variants:
        record, baseline = _run_one(setting, variant, baseline)
        yield record


def _run_one(setting: Setting, variant: Variant, baseline: _Baseline | None) -> tuple[RunRecord, _Baseline]:
    import trimtab as tt
    from trimtab.evaluation import fidelity, to_json
    from trimtab.evaluation.probes import measure_speed
    from trimtab.models import info_of, ledger_of

    record = RunRecord(command="compare", config=_config(setting, variant), seed=setting.seed)
    with record.timed("load"):
        model = tt.load(setting.model, device=setting.device)
    if variant.recipe is not None:
        with record.timed("compress"):
            _compress(model, setting, variant.recipe)
        done = info_of(model).record
        assert done is not None
        record.changed, record.unchanged = done.changed, done.unchanged
        record.config["compress"] = done.config
    record.ledger = ledger_of(model).to_dict()
    with record.timed("evaluate"):
        reference = None if baseline is None else baseline.results
        results = tt.evaluate(model, setting.tasks, limit=setting.limit, seed=setting.seed, reference=reference)
        record.metrics |= to_json(results)
        # A list, since the order of keys is lost when a record is saved.
        record.metrics["main_metrics"] = [[name, next(iter(result.metrics))] for name, result in results.items()]
    with record.timed("fidelity"):
        if baseline is None:
            baseline = _Baseline(next_tokens(model, setting.seed), results)
        else:
            measured = fidelity(model, baseline.next_tokens)
            record.metrics["fidelity"] = {name: estimate.to_dict() for name, estimate in measured.items()}
    with record.timed("speed"):
        record.metrics["speed"] = measure_speed(model).to_dict()
    if setting.prompt is not None:
        record.metrics["samples"] = [{"prompt": setting.prompt, "text": _sample(model, setting)}]
    return record, baseline


def _config(setting: Setting, variant: Variant) -> dict[str, Any]:
    recipe = None if variant.recipe is None else variant.recipe.to_dict()
    own = {"label": variant.label, "method": variant.method, "bits": variant.bits, "recipe": recipe}
    shared = asdict(setting) | {
        "tasks": list(setting.tasks),
        "text": None if setting.text is None else str(setting.text),
    }
    return own | shared


def _compress(model: PreTrainedModel, setting: Setting, recipe: Recipe) -> None:
    from trimtab.app.cli.compress import calibration_of
    from trimtab.models.compression import compress

    calibration = calibration_of(model, recipe, setting.text, setting.sequences, setting.length, setting.seed)
    compress(model, recipe, calibration=calibration, mode=setting.mode, seed=setting.seed)


def next_tokens(model: PreTrainedModel, seed: int) -> NextTokens:
    """The model's predictions on as many windows of held-out prose as are usual, or as fit into memory."""
    from trimtab.evaluation import NextTokens
    from trimtab.evaluation.kl import LENGTH, MAX_BYTES, WINDOWS

    fitting = MAX_BYTES // (LENGTH * 4 * int(model.config.get_text_config().vocab_size))
    return NextTokens.of(model, windows=max(2, min(WINDOWS, fitting)), seed=seed)


def _sample(model: PreTrainedModel, setting: Setting) -> str:
    from trimtab.app.cli.generate import continue_tokens, encode_prompt

    assert setting.prompt is not None
    ids = encode_prompt(model, setting.prompt, setting.sample_tokens)
    text, _ = continue_tokens(
        model, ids, max_new_tokens=setting.sample_tokens, temperature=setting.temperature, seed=setting.seed
    )
    return text


def save_records(records: Iterator[RunRecord], out: Path) -> Iterator[RunRecord]:
    """Save each record to `out/runs` as it comes and pass it on; an earlier comparison there goes with the first."""
    for index, record in enumerate(records):
        if index == 0:
            for old in [*(out / "runs").glob("*.json"), out / "report.html"]:
                old.unlink(missing_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", record.config["label"].lower()).strip("-")
        record.save(out / "runs" / f"{index:02}-{name}.json")
        yield record
