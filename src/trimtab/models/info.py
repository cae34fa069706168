"""What trimtab knows of a loaded model beside its weights: its source, its tokenizer, what was done to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.core.recipe import Recipe
from trimtab.core.run_record import RunRecord
from trimtab.models.compressed_linear import CompressedLinear

if TYPE_CHECKING:  # the quantizer imports this module while transformers is still being imported
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


UNNAMED = "a model in memory"
"""The source of a model that was built and not loaded."""


@dataclass
class ModelInfo:
    """The attribute `trimtab` of a loaded model.

    source           what it was loaded from, as given; UNNAMED if it was built in memory
    tokenizer        its tokenizer, None if the source has none
    recipe           what was done to the weights, None if nothing was
    record           the run that did it
    baseline_bytes   tensor bytes at rest of the uncompressed model, in the dtype it was loaded in
    fitted_caches    what cache methods have learnt from calibration text: key of method and options -> named tensors
    """

    source: str
    tokenizer: PreTrainedTokenizerBase | None
    recipe: Recipe | None
    record: RunRecord | None
    baseline_bytes: int
    fitted_caches: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def info_of(model: PreTrainedModel) -> ModelInfo:
    """The model's `trimtab` attribute; made, and attached, for a model that was not loaded by trimtab."""
    info = getattr(model, "trimtab", None)
    if not isinstance(info, ModelInfo):
        source = str(getattr(model.config, "name_or_path", "")) or UNNAMED
        info = ModelInfo(source, None, None, None, uncompressed_bytes(model))
        attach(model, info)
    return info


def attach(model: PreTrainedModel, info: ModelInfo) -> None:
    """Make `info` the model's `trimtab` attribute."""
    model.trimtab = info  # type: ignore[assignment]


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ConfigError if it came without one."""
    info = info_of(model)
    if info.tokenizer is None and info.source != UNNAMED:
        info.tokenizer = find_tokenizer(info.source)
    if info.tokenizer is None:
        raise ConfigError(
            f"no tokenizer is known for {info.source}. Load a directory with tokenizer files, or set "
            "model.trimtab.tokenizer."
        )
    return info.tokenizer


def find_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or a Hugging Face id, None if there is none. Raises CheckpointError if damaged."""
    directory = Path(source)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if directory.is_dir() and not any((directory / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        if not directory.is_dir() and isinstance(error, OSError):
            return None
        raise CheckpointError(f"the tokenizer in {source} cannot be read: {_first_line(error)}") from None
    return tokenizer


def info_from_manifest(manifest: Mapping[str, Any], source: str, dtype: torch.dtype) -> ModelInfo:
    """What a checkpoint's trimtab.json says of the model; the tokenizer is not read. Raises CheckpointError.

    The baseline is that of a model in `dtype`, which need not be the one that was saved.
    """
    recipe, record = manifest.get("recipe"), manifest.get("record")
    try:
        return ModelInfo(
            source,
            None,
            None if recipe is None else Recipe.from_dict(recipe, source),
            None if record is None else RunRecord.from_dict(record),
            int(manifest["baseline_bytes"]) * dtype.itemsize // getattr(torch, manifest["dtype"]).itemsize,
        )
    except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: trimtab.json cannot be used: {error}") from None


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that is saved; a tensor that several names share appears under the first."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        storage = tensor.untyped_storage()
        key = (
            (id(tensor),)
            if tensor.is_meta or not tensor.numel()
            else (storage.data_ptr(), tensor.data_ptr(), tensor.shape)
        )
        if key not in seen:
            seen.add(key)
            found[name] = tensor
    return found


def uncompressed_bytes(model: PreTrainedModel) -> int:
    """Tensor bytes at rest, each compressed weight counted as dense in the model's dtype."""
    element = model.dtype.itemsize
    total = sum(t.numel() * t.element_size() for t in stored_tensors(model).values())
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            total += module.out_features * module.in_features * element - module.tensor.nbytes
    return total


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
