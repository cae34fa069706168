"""Write a model, compressed or not, as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

import trimtab
from trimtab.core.errors import OutputError, TargetError
from trimtab.core.files import atomic_directory, refuse_occupied, sha256_file
from trimtab.models.checkpoint import FORMAT_VERSION, MANIFEST, read_headers, tensor_checksums, weight_files
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.counting import ledger_of
from trimtab.models.fitted_caches import write_fitted
from trimtab.models.info import info_of, stored_tensors
from trimtab.models.narrow import narrow_linears
from trimtab.models.quantizer import TrimtabQuantizationConfig

MAX_SHARD_SIZE = "5GB"
LARGE_BYTES = 10**9


def save(model: PreTrainedModel, directory: str | Path, *, force: bool = False) -> Path:
    """Write the model, its tokenizer and what was done to it; `load` and `from_pretrained` give the same logits back.

    Tables that cache methods have learnt for the model are written too, and `load` reads them.

    The model's own `save_pretrained` writes a directory that loads too, but without checksums, recipe and record.
    The directory appears complete or not at all: what stood there is whole until the last step, also if the disk
    fills up or the process is killed. Raises OutputError if it is not empty and `force` is not set, or cannot be
    written. Returns the directory.
    """
    directory = Path(directory).expanduser()
    refuse_occupied(directory, force)
    large = sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model).values()) > LARGE_BYTES
    with atomic_directory(directory, force=force) as partial:
        try:
            describe(model)
            with quiet(large=large):
                model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
            if (tokenizer := info_of(model).tokenizer) is not None:
                tokenizer.save_pretrained(partial)
        except OSError:
            raise  # becomes an OutputError outside
        except Exception as error:  # safetensors and tokenizers raise errors of their own when the disk refuses
            raise OutputError(f"{directory} cannot be written ({error}); nothing was changed.") from error
        weights = tensor_checksums(read_headers(weight_files(partial)))
        write_fitted(partial, info_of(model).fitted_caches, weights)
        for file in partial.glob("*.safetensors"):  # safetensors makes them readable by their owner only
            shutil.copymode(partial / "config.json", file)
        manifest = _manifest(model, partial, weights)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return directory


@contextmanager
def quiet(*, large: bool) -> Iterator[None]:
    """No progress bars of transformers, unless the model is so large that its files take seconds."""
    hide = hf_logging.is_progress_bar_enabled() and not large
    if hide:
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if hide:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def describe(model: PreTrainedModel) -> None:
    """Make `model.config` describe the compressed and the narrow layers that the model has now, so that whoever saves
    it saves that too."""
    layers = {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    narrow = narrow_linears(model)
    if layers or narrow:
        model.config.quantization_config = TrimtabQuantizationConfig(
            layers, str(model.config.model_type), FORMAT_VERSION, trimtab.__version__, narrow=narrow
        )


def _manifest(model: PreTrainedModel, directory: Path, weights: dict[str, str]) -> dict[str, Any]:
    info = info_of(model)
    return {
        "format_version": FORMAT_VERSION,
        "trimtab_version": trimtab.__version__,
        "model_type": str(model.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "source": info.source,
        "recipe": None if info.recipe is None else info.recipe.to_dict(),
        "record": None if info.record is None else info.record.to_dict(),
        "baseline_bytes": info.baseline_bytes,
        "ledger": _ledger(model),
        "files": {file.name: sha256_file(file) for file in sorted(directory.iterdir()) if file.is_file()},
        "tensors": weights,
    }


def _ledger(model: PreTrainedModel) -> dict[str, Any] | None:
    try:
        return ledger_of(model).to_dict()
    except TargetError:  # a family that has no views yet can be saved, but not counted
        return None
