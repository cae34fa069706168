"""Load a model by any of its names: ref, a directory, a trimtab checkpoint, a Hugging Face id."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

import trimtab
from trimtab.core.errors import CheckpointError, ConfigError, TrimtabError, did_you_mean
from trimtab.models.checkpoint import MANIFEST, check_tensors, read_headers, read_json, read_manifest, weight_files
from trimtab.models.info import ModelInfo, attach, find_tokenizer, info_from_manifest, uncompressed_bytes
from trimtab.models.registration import register
from trimtab.models.saving import LARGE_BYTES, quiet

ASSETS = Path(trimtab.__file__).resolve().parent / "assets"
REFERENCES = ("ref", "ref-mini")
_HUB_SECONDS = 10.0


def load(
    source: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with a ModelInfo as its attribute `trimtab`.

    source   `ref` or `ref-mini` (shipped with trimtab; a directory of that name is `./ref`), a local directory, which
             may be a trimtab checkpoint, or a Hugging Face id `owner/name`, from the local cache if it is there
    dtype    of the uncompressed tensors; the default is the checkpoint's. Compressed layers keep their stored dtypes.
    device   where to put it; the default is the CPU

    Code that a checkpoint brings along is not run.
    Raises ConfigError for a name that is none of these (with a suggestion), a dtype or a device that cannot be used,
    and CheckpointError for files that are missing, truncated, damaged, of a newer trimtab, or for another architecture.
    """
    register()
    chosen_dtype, chosen_device = _dtype(dtype), _device(device)
    place = _resolve(source)
    manifest = _check_directory(place) if isinstance(place, Path) else None
    try:
        model = _from_pretrained(place, chosen_dtype, chosen_device, manifest is not None)
    except TrimtabError:
        raise
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {_first_line(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{place} does not hold a model that can be loaded: {_first_line(error)}") from error
    info = getattr(model, "trimtab", None)  # set by the quantizer if there are compressed layers
    if manifest is not None:
        info = info_from_manifest(manifest, str(place), model.dtype)
    elif not isinstance(info, ModelInfo):
        info = ModelInfo(str(place), None, None, None, uncompressed_bytes(model))
    info.source = str(source)
    info.tokenizer = find_tokenizer(str(place))
    attach(model, info)
    return model


def _resolve(source: str | Path) -> Path | str:
    """A directory, or a Hugging Face id. Raises ConfigError."""
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
    return name


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
    place: Path | str, dtype: torch.dtype | str, device: torch.device | None, exact: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if device is not None:
        options["device_map"] = {"": device}
    if isinstance(place, Path):
        options["local_files_only"] = True
        large = sum(file.stat().st_size for file in weight_files(place)) > LARGE_BYTES
    else:
        options["local_files_only"] = _is_cached(place)
        if not options["local_files_only"]:
            _ask_hub(place)
        large = True
    with quiet(large=large), _no_reports():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(place, **options)  # type: ignore[assignment]
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise CheckpointError(
            f"{place}: '{name}' is {list(stored)} in the weights, but {type(model).__name__} of config.json wants "
            f"{list(wanted)}{_more(mismatched)}. The configuration and the weights are of different models."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{place}: the weights lack '{missing[0]}', which {type(model).__name__} of config.json needs"
            f"{_more(missing)}. The configuration and the weights are of different models."
        )
    if unused := sorted(report["unexpected_keys"]):
        text = f"{place}: the weights hold '{unused[0]}', which {type(model).__name__} does not use{_more(unused)}."
        if exact:
            raise CheckpointError(f"{text} The configuration and the weights are of different models.")
        warnings.warn(text, stacklevel=3)
    return model


def _is_cached(name: str) -> bool:
    """Whether the configuration of a Hugging Face id can be had without asking the network."""
    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def _ask_hub(name: str) -> None:
    """Raise ConfigError if Hugging Face does not have it, or does not answer; asks once, without retries."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except Exception as error:  # its errors share no base: connection, name, access, offline mode
        raise ConfigError(_unknown(name, f"Hugging Face has no answer: {_first_line(error)}")) from None


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
