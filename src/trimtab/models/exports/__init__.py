"""Write a compressed model in a format that others read. Names of formats and their files: FORMATS."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, OutputError, TargetError, did_you_mean
from trimtab.core.files import atomic_directory, atomic_file, refuse_occupied
from trimtab.models.exports.base import Exported, ExportFormat, Source

__all__ = ["FORMATS", "Exported", "check_path", "export", "format_class"]

FORMATS = {
    "compressed-tensors": ("compressed_tensors", "CompressedTensors"),
    "gptq": ("gptq", "GptqCheckpoint"),
    "gguf": ("gguf", "Gguf"),
    "peft": ("peft", "Peft"),
}
"""Name -> (module of this package, class)."""


def format_class(name: str) -> type[ExportFormat]:
    """The class of a format. Raises ConfigError with a suggestion for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(f"unknown export format '{name}'. {did_you_mean(name, FORMATS)}")
    module, cls = FORMATS[name]
    found: type[ExportFormat] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found


def export(model: PreTrainedModel, path: str | Path, *, format: str, force: bool = False, **options: Any) -> Exported:
    """Write a compressed model to `path` in another library's format, without passing through dense weights.

    format    a key of FORMATS: compressed-tensors, gptq, peft write a directory, gguf a file
    options   of that format, see its class

    Raises ConfigError for an unknown format or option, TargetError naming the layer and the part that the format cannot
    hold (and the formats that can), MissingExtra if a library is needed and not there, OutputError if the path is
    occupied and `force` is not set or cannot be written. Nothing is written before all layers have been accepted, and
    the result appears complete or not at all.
    """
    fmt = format_class(format).from_options(options)
    path = Path(path).expanduser()
    check_path(fmt, path, force=force)
    source = Source.of(model)
    _check_layers(fmt, source)
    fmt.check_source(source)
    if fmt.marker is None:
        with atomic_file(path) as partial:
            layers = fmt.write(source, partial, path)
        return Exported(path, fmt.name, path.stat().st_size, layers)
    with atomic_directory(path, force=force) as partial:
        layers = fmt.write(source, partial, path)
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Exported(path, fmt.name, nbytes, layers)


def check_path(fmt: ExportFormat, path: Path, *, force: bool) -> None:
    """Raise OutputError if what stands at `path` is in the way."""
    if fmt.marker is not None:
        refuse_occupied(path, force)
    elif path.is_dir():
        raise OutputError(f"output {path} is a directory; {fmt.name} writes one file: give {path / 'model.gguf'}.")
    elif path.exists() and not force:
        raise OutputError(f"output {path} exists. Choose another, or replace it with --force.")


def _check_layers(fmt: ExportFormat, source: Source) -> None:
    if not source.layers:
        raise TargetError("the model has no compressed layers to export; compress it first, or use tt.save.")
    for name, layer in source.layers.items():
        if reason := fmt.refusal(layer):
            others = [format_class(other) for other in FORMATS if other != fmt.name]
            offers = [offer for other in others if (offer := other.offer(layer, source))]
            way_out = f"Formats that can hold it: {', '.join(offers)}" if offers else "No other format holds it either"
            raise TargetError(f"{fmt.name} cannot hold layer '{name}': {reason}. {way_out}. Nothing was written.")
