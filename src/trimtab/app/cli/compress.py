"""`trimtab compress MODEL --method ... -o OUT`: compress, save, say what changed and what it saved."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimtab.app.cli.options import (
    AsJson,
    Device,
    Force,
    Model,
    Seed,
    Settings,
    check_output,
    check_text,
    read_settings,
    typed_settings,
)
from trimtab.app.cli.output import emit_json, show, table
from trimtab.app.report import text as figures
from trimtab.app.report.rows import Interval
from trimtab.core.errors import ConfigError
from trimtab.core.registry import method_class, method_info

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.recipe import Recipe
    from trimtab.core.run_record import RunRecord
    from trimtab.evaluation.base import Estimate

EXAMPLES = (
    "trimtab compress ref --method gptq --set bits=4 -o ref-gptq4",
    "trimtab compress ref --method rtn --set bits=3 --set group_size=32 --set targets=gate,up,down -o ref-rtn3",
    "trimtab compress ref --budget 0.3 -o ref-30-percent",
    "trimtab compress ref --budget 5MB --set group_sizes=32,64 -o ref-5mb",
    "trimtab compress ref --recipe ref-gptq4/recipe.yaml -o again --text my-text.txt --sequences 64",
)
BUDGET_METHOD = "mixed"


class Mode(str, Enum):
    """The values of --mode."""

    sequential = "sequential"
    dense = "dense"


Text = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text to calibrate on; without it, the prose that comes with trimtab.", show_default=False),
]
Sequences = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens per calibration sequence.", show_default="the context, at most 2048")
]
CalibrationMode = Annotated[
    Mode | None,
    typer.Option(
        help="sequential: layers see what the compressed ones before them make. dense: one pass.",
        show_default="the method's own",
    ),
]


def build_recipe(method: str, settings: Mapping[str, str]) -> Recipe:
    """A recipe of one method. Raises ConfigError for an unknown method or option and for a value out of range."""
    from trimtab.core.recipe import Recipe

    name = method_info(method).name
    options = typed_settings(method_class(name), dict(settings))
    return Recipe.from_dict({"steps": [{"method": name, **options}]}, source=f"--method {name}")


def _chosen_recipe(
    method: str | None, settings: list[str] | None, file: Path | None, budget: str | None = None
) -> Recipe:
    from trimtab.core.recipe import Recipe

    if budget is not None and file is None:
        method = method or BUDGET_METHOD
        if "budget" not in {field.name for field in dataclasses.fields(method_class(method))}:
            raise ConfigError(
                f"method '{method}' takes no --budget; '{BUDGET_METHOD}' does, and is meant without --method."
            )
        settings = [*(settings or ()), f"budget={budget}"]
    elif budget is not None or (method is None) == (file is None):
        raise ConfigError("give either --method NAME or --budget BYTES, with --set OPTION=VALUE, or --recipe FILE.")
    if method is not None:
        return build_recipe(method, read_settings(settings))
    if settings:
        raise ConfigError("--set goes with --method; write the options of --recipe into its file.")
    assert file is not None
    return Recipe.from_yaml(file)


def calibration_of(model: Any, recipe: Recipe, text: Path | None, sequences: int, length: int | None, seed: int) -> Any:
    """The calibration set that --text, --sequences, --length and --seed stand for; None if the method needs no data.

    Raises DataError if the text is too short for one sequence.
    """
    from trimtab.models import tokenizer_of
    from trimtab.models.calibration_set import CalibrationSet

    if not any(getattr(step, "needs_text", False) for step in recipe.methods()):
        return None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return CalibrationSet.from_text(
        text, tokenizer_of(model), sequences=sequences, length=length, context=context, seed=seed
    )


def run(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the checkpoint.", show_default=False)],
    method: Annotated[str | None, typer.Option(help="A name from trimtab list.", show_default=False)] = None,
    settings: Settings = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the whole model: a share of what it takes in bfloat16 (0.3) or a size (400MB). "
            "Each matrix gets its own configuration; states what it expects to lose and what it lost.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file: steps with options.", show_default=False)] = None,
    text: Text = None,
    sequences: Sequences = 128,
    length: Length = None,
    mode: CalibrationMode = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model into a checkpoint that transformers loads.

    Killed at any point, the same command continues where it was.
    What stood at the output stays until the new checkpoint is complete.
    """
    wanted = _chosen_recipe(method, settings, recipe, budget)
    check_output(out, force, holds="config.json")
    check_text(text)

    import trimtab as tt
    from trimtab.app.comparison import next_tokens
    from trimtab.evaluation import fidelity
    from trimtab.models import info_of, ledger_of
    from trimtab.models.compression import compress_to

    loaded = tt.load(model, device=device)
    before = ledger_of(loaded)
    calibration = calibration_of(loaded, wanted, text, sequences, length, seed)
    original = next_tokens(loaded, seed) if _is_planned(wanted) else None
    compress_to(loaded, wanted, out, force=force, calibration=calibration, mode=named(mode), seed=seed)
    after = ledger_of(loaded)
    record = info_of(loaded).record
    assert record is not None
    measured = None if original is None else fidelity(loaded, original)["kl_nats_per_token"]
    if as_json:
        ledgers = {"before": before.to_dict(), "after": after.to_dict()}
        done = {"model": model, "out": str(out), "recipe": wanted.to_dict(), "ledger": ledgers, **_changes(record)}
        if measured is not None:
            done |= {"plan": record.metrics["plan"], "measured": {"kl_nats_per_token": measured.to_dict()}}
        emit_json(done)
        return
    show(_changed_table(record), _ledger_table(before.to_dict(), after.to_dict()))
    if measured is not None:
        show(_plan_table(record.metrics["plan"], measured))
    for reason, count in Counter(entry["reason"] for entry in record.unchanged).items():
        show(f"left alone: {count} x {reason}")
    show(f'\nSaved to {out} in {record.seconds.get("total", 0.0):.1f} s. Try: trimtab generate {out} -p "..."')


def named(mode: Mode | None) -> Literal["sequential", "dense"] | None:
    """The calibration mode that --mode asks for; None: the method's own."""
    return None if mode is None else mode.value


def _is_planned(recipe: Recipe) -> bool:
    """Whether the recipe says what it expects to lose, beside which the loss is then measured."""
    return any(step.method == BUDGET_METHOD for step in recipe.steps)


def _plan_table(plan: Mapping[str, Any], measured: Estimate) -> Table:
    """How the budget was spent, and what that was expected to cost and did."""
    counts = Counter(plan["choices"].values())
    rows = [(label, str(count)) for label, count in sorted(counts.items())]
    rows += [
        ("budget", figures.size(plan["budget_bytes"])),
        ("planned", figures.size(plan["planned_bytes"])),
        ("expected KL to the original, nats per token", figures.number(plan["expected_kl_nats_per_token"])),
        ("measured on held-out prose", figures.interval(Interval.of(measured.to_dict()))),
    ]
    return table("Plan", ("", "matrices"), rows, right=("matrices",))


def _changes(record: RunRecord) -> dict[str, Any]:
    return {"changed": record.changed, "unchanged": record.unchanged, "seconds": record.seconds}


def _changed_table(record: RunRecord) -> Table:
    """Changed linears by role; the list of all of them is in the JSON and in the checkpoint's record."""
    rows = []
    for role in dict.fromkeys(entry["role"] for entry in record.changed):
        own = [entry for entry in record.changed if entry["role"] == role]
        shapes = sorted({f"{entry['shape'][0]} x {entry['shape'][1]}" for entry in own})
        nbytes = sum(entry["nbytes"] for entry in own)
        weights = sum(entry["shape"][0] * entry["shape"][1] for entry in own)
        worst = max(own, key=_error)
        cells = (role, str(len(own)), ", ".join(shapes), figures.size(nbytes), f"{8 * nbytes / weights:.2f}")
        rows.append((*cells, figures.number(_error(worst)), worst["linear"]))
    columns = ("role", "linears", "out x in", "bytes", "bits / weight", f"largest {_error_kind(record)} error", "where")
    return table("Changed", columns, rows, right=columns[1:6])


def _error_kind(record: RunRecord) -> str:
    return "output" if any("relative_error" in entry for entry in record.changed) else "weight"


def _error(entry: Mapping[str, Any]) -> float:
    """Error of the layer's output relative to its size, or of its weight where inputs were not seen."""
    return float(entry.get("relative_error", entry.get("relative_weight_error", 0.0)))


_LEDGER_ROWS = {
    "bytes_at_rest": "bytes at rest",
    "resident_bytes": "bytes in memory",
    "bytes_read_per_token": "bytes read per token",
    "kv_bytes_per_token": "cache bytes per token",
}


def _ledger_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    rows = [
        (label, figures.size(before[key]), figures.size(after[key]), f"{after[key] / before[key]:.3f}")
        for key, label in _LEDGER_ROWS.items()
    ]
    bits = after["bits_per_weight"]
    rows.append(("bits per weight, compressed layers", "", figures.NOTHING if bits is None else f"{bits:.2f}", ""))
    columns = ("", "before", "after", "kept")
    return table("Cost", columns, rows, right=columns[1:])
