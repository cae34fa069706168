"""`trimtab compress MODEL --method ... -o OUT`: compress, save, say what changed and what it saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from trimtab.core.errors import ConfigError
from trimtab.core.registry import method_class, method_info

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.recipe import Recipe
    from trimtab.core.run_record import RunRecord

EXAMPLES = (
    "trimtab compress ref --method gptq --set bits=4 -o ref-gptq4",
    "trimtab compress ref --method rtn --set bits=3 --set group_size=32 --set targets=gate,up,down -o ref-rtn3",
    "trimtab compress ref --recipe ref-gptq4/recipe.yaml -o again --text my-text.txt --sequences 64",
)


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
    Mode, typer.Option(help="sequential: layers see what the compressed ones before them make. dense: one pass.")
]


def build_recipe(method: str, settings: Mapping[str, str]) -> Recipe:
    """A recipe of one method. Raises ConfigError for an unknown method or option and for a value out of range."""
    from trimtab.core.recipe import Recipe

    name = method_info(method).name
    options = typed_settings(method_class(name), dict(settings))
    return Recipe.from_dict({"steps": [{"method": name, **options}]}, source=f"--method {name}")


def _chosen_recipe(method: str | None, settings: list[str] | None, file: Path | None) -> Recipe:
    from trimtab.core.recipe import Recipe

    if (method is None) == (file is None):
        raise ConfigError("give either --method NAME (with --set OPTION=VALUE) or --recipe FILE.")
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
    recipe: Annotated[Path | None, typer.Option(help="YAML file: steps with options.", show_default=False)] = None,
    text: Text = None,
    sequences: Sequences = 128,
    length: Length = None,
    mode: CalibrationMode = Mode.sequential,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model into a checkpoint that transformers loads.

    Killed at any point, the same command continues where it was.
    What stood at the output stays until the new checkpoint is complete.
    """
    wanted = _chosen_recipe(method, settings, recipe)
    check_output(out, force, holds="config.json")
    check_text(text)

    import trimtab as tt
    from trimtab.models import info_of, ledger_of
    from trimtab.weights import compress_to

    loaded = tt.load(model, device=device)
    before = ledger_of(loaded)
    calibration = calibration_of(loaded, wanted, text, sequences, length, seed)
    compress_to(loaded, wanted, out, force=force, calibration=calibration, mode=mode.value, seed=seed)
    after = ledger_of(loaded)
    record = info_of(loaded).record
    assert record is not None
    if as_json:
        ledgers = {"before": before.to_dict(), "after": after.to_dict()}
        emit_json({"model": model, "out": str(out), "recipe": wanted.to_dict(), "ledger": ledgers, **_changes(record)})
        return
    show(_changed_table(record), _ledger_table(before.to_dict(), after.to_dict()))
    for reason, count in Counter(entry["reason"] for entry in record.unchanged).items():
        show(f"left alone: {count} x {reason}")
    show(f'\nSaved to {out} in {record.seconds.get("total", 0.0):.1f} s. Try: trimtab generate {out} -p "..."')


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
