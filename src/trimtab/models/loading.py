"""Load a model by any of its names: ref, a directory, a trimtab checkpoint, a Hugging Face id."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

import trimtab
from trimtab.core.errors import CheckpointError, ConfigError, TrimtabError, did_you_mean
from trimtab.models.checkpoint import MANIFEST, check_tensors, read_headers, read_json, read_manifest, weight_files
from trimtab.models.fitted_caches import read_fitted
from trimtab.models.imports import foreign_method, load_foreign
from trimtab.models.info import ModelInfo, attach, find_tokenizer, info_from_manifest, uncompressed_bytes
from trimtab.models.registration import register
from trimtab.models.saving import LARGE_BYTES, quiet

ASSETS = Path(trimtab.__file__).resolve().parent / "assets"
REFERENCES = ("ref", "ref-mini")
_HUB_SECONDS = 10.0
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def load(
    source: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with a ModelInfo as its attribute `trimtab`.

    source   `ref` or `ref-mini` (shipped with trimtab; a directory of that name is `./ref`), a local directory, which
             may be a trimtab checkpoint, or a Hugging Face id `owner/name`, from the local cache if it is there;
             layers of GPTQ and of compressed-tensors `pack-quantized` checkpoints become our grids, code by code
    dtype    of the uncompressed tensors; the default is the checkpoint's. Compressed layers keep their stored dtypes.
    device   where to put it; the default is the CPU

    Code that a checkpoint brings along is not run.
    Raises ConfigError for a name that is none of these (with a suggestion), a dtype or a device that cannot be used,
    and CheckpointError for files that are missing, truncated, damaged, of a newer trimtab, or for another architecture.
    """
    register()
    chosen_dtype, chosen_device = _dtype(dtype), _device(device)
    directory = _resolve(source)
    manifest = _check_directory(directory)
    try:
        model = _from_pretrained(directory, chosen_dtype, chosen_device, manifest is not None)
    except TrimtabError:
        raise
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {_first_line(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} does not hold a model that can be loaded: {_first_line(error)}") from error
    if manifest is not None:
        info = info_from_manifest(manifest, str(source), model.dtype)
        info.fitted_caches = read_fitted(directory, manifest["tensors"])
    else:
        info = ModelInfo(str(source), None, None, None, uncompressed_bytes(model))
    info.tokenizer = find_tokenizer(str(directory))
    attach(model, info)
    return model


def _resolve(source: str | Path) -> Path:
    """The directory that a name stands for, fetched if need be. Raises ConfigError."""
    name = str(source)
    if name in REFERENCES:
        if not (ASSETS / name / "config.json").exists():
            raise ConfigError(f"the reference model '{name}' is not part of this installation ({ASSETS / name}).")
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(f"model '{name}' is a file; give the directory that holds config.json and the weights.")
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(_unknown(name, "no such directory"))
    return _cached(name) or _fetch(name)


def _cached(name: str) -> Path | None:
    """The directory of a Hugging Face id in the local cache, None if it is not there whole."""
    try:
        directory = Path(snapshot_download(name, local_files_only=True))
        weight_files(directory)
    except (OSError, ValueError, CheckpointError):
        return None
    return directory if (directory / "config.json").exists() else None


def _fetch(name: str) -> Path:
    """Fetch a Hugging Face id into the local cache. Raises ConfigError if there is no answer, after asking once."""
    try:
        siblings = HfApi().model_info(name, timeout=_HUB_SECONDS).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        weights = "model*.safetensors" if fnmatch.filter(names, "model*.safetensors") else "pytorch_model*.bin"
        # other names, and what lies in folders, are the same weights for other libraries
        return Path(snapshot_download(name, allow_patterns=[weights, *_SMALL_FILES], ignore_patterns=["*/*"]))
    except Exception as error:  # its errors share no base: connection, name, access, offline mode
        raise ConfigError(_unknown(name, f"Hugging Face has no answer: {_first_line(error)}")) from None


def _unknown(name: str, reason: str) -> str:
    beside = Path(name).expanduser().parent
    directories = [str(p) for p in beside.iterdir() if p.is_dir()] if "/" in name and beside.is_dir() else []
    hint = did_you_mean(name, [*REFERENCES, *directories[:30]])
    return f"unknown model '{name}' ({reason}). {hint} Or give a directory, or a Hugging Face id such as 'owner/name'."


def _check_directory(directory: Path) -> dict[str, Any] | None:
    """Look at every file before transformers does. Returns the manifest. Raises CheckpointError."""
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} has no config.json, so it is not a model directory.")
    config = read_json(directory / "config.json")
    tensors = read_headers(weight_files(directory))
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    if config.get("model_type") != manifest.get("model_type"):
        raise CheckpointError(
            f"{directory}: config.json describes a model of type '{config.get('model_type')}', but {MANIFEST} says "
            f"that the weights are of a '{manifest.get('model_type')}'."
        )
    if not isinstance(config.get("quantization_config"), dict):
        # the quantizer checks the others, for every way of loading
        check_tensors(tensors, manifest, str(directory))
    return manifest


def _from_pretrained(
    directory: Path, dtype: torch.dtype | str, device: torch.device | None, exact: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "local_files_only": True,
    }
    if device is not None:
        options["device_map"] = {"": device}
    method = foreign_method(read_json(directory / "config.json"))
    large = sum(file.stat().st_size for file in weight_files(directory)) > LARGE_BYTES
    with quiet(large=large), _no_reports():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = (
            load_foreign(directory, method, options)
            if method
            else AutoModelForCausalLM.from_pretrained(directory, **options)  # type: ignore[assignment]
        )
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise CheckpointError(
            f"{directory}: '{name}' is {list(stored)} in the weights, but {type(model).__name__} of config.json wants "
            f"{list(wanted)}{_more(mismatched)}. The configuration and the weights are of different models."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory}: the weights lack '{missing[0]}', which {type(model).__name__} of config.json needs"
            f"{_more(missing)}. The configuration and the weights are of different models."
        )
    if unused := sorted(report["unexpected_keys"]):
        text = f"{directory}: the weights hold '{unused[0]}', which {type(model).__name__} does not use{_more(unused)}."
        if exact:
            raise CheckpointError(f"{text} The configuration and the weights are of different models.")
        warnings.warn(text, stacklevel=3)
    return model


@contextmanager
def _no_reports() -> Iterator[None]:
    """transformers logs a table of keys that do not fit; the errors here say it in a sentence."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype != "auto" and dtype not in names:
        raise ConfigError(f"unknown dtype '{dtype}'. {did_you_mean(dtype, ['auto', *names])}")
    return names.get(dtype, dtype)


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {_first_line(error)}") from None
    return chosen


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
