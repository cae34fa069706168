"""The trimtab checkpoint on disk: a Hugging Face directory with `trimtab.json`, which vouches for every tensor.

config.json           with `quantization_config`: method "trimtab", versions, layer -> spec of its compressed tensor
model*.safetensors    the state dictionary as Hugging Face writes it; compressed layers hold `part0_codes`, ...
trimtab.json          the manifest: recipe, run record, ledger, SHA-256 of each file, checksum of each tensor

A model without compressed layers has no `quantization_config` and loads anywhere. This module reads files only; it
needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import CheckpointError
from trimtab.core.files import sha256_file

FORMAT_VERSION = 1
MANIFEST = "trimtab.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000
"""The limit of the safetensors format; a longer header is a damaged length field."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file; `dtype` in safetensors' names (F16, BF16, U8)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing, no JSON or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: it is not valid JSON ({error}). Fetch or save it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(data).__name__}, not a JSON object.")
    return data


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory; empty if its weights are of another kind.

    Raises CheckpointError if there are no weights, or if the index names a file that is not there.
    """
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if (directory / WEIGHTS_INDEX).exists():
        weight_map = read_json(directory / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{directory / WEIGHTS_INDEX} is damaged: it has no 'weight_map'.")
        files = [directory / str(name) for name in sorted({str(name) for name in weight_map.values()})]
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(
                f"{directory} lacks {missing[0]}, one of the {len(files)} weight files its index names."
            )
        return files
    if any(directory.glob("pytorch_model*.bin")):
        return []
    raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there.")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> place of the tensors in a safetensors file. Raises CheckpointError if it is truncated or damaged."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{file} is truncated or damaged: {size} bytes do not hold its header of {length} bytes."
                )
            entries = json.loads(handle.read(length))
        begin = 8 + length
        tensors = {
            str(name): StoredTensor(
                file,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                begin + int(entry["data_offsets"][0]),
                begin + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: its safetensors header cannot be read ({error}).") from None
    wanted = max((tensor.end for tensor in tensors.values()), default=begin)
    if wanted != size or any(not begin <= tensor.start <= tensor.end for tensor in tensors.values()):
        raise CheckpointError(
            f"{file} is truncated or damaged: its header describes {wanted} bytes, the file has {size}. "
            "Fetch or save it again."
        )
    return tensors


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of all files. Raises CheckpointError as `read_header` does."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= read_header(file)
    return found


def tensor_checksums(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name -> BLAKE2b (128 bits, hex) of dtype, shape and bytes as stored. Reads every byte, files side by side."""
    maps: dict[Path, mmap.mmap] = {}
    for file in {tensor.file for tensor in tensors.values()}:
        with open(file, "rb") as handle:
            maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def digest(tensor: StoredTensor) -> str:
        digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=16)
        with memoryview(maps[tensor.file]) as data, data[tensor.start : tensor.end] as content:
            digest.update(content)
        return digest.hexdigest()

    try:
        with ThreadPoolExecutor() as pool:
            return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
    finally:
        for mapped in maps.values():
            mapped.close()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """`trimtab.json` of a checkpoint, None if there is none. Raises CheckpointError if it is damaged or too new."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    check_version(manifest.get("format_version"), manifest.get("trimtab_version"), str(directory))
    if not isinstance(manifest.get("tensors"), dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path} is damaged: it lacks the checksums under 'tensors' or 'files'.")
    return manifest


def check_version(format_version: object, trimtab_version: object, source: str) -> None:
    """Raise CheckpointError if a checkpoint is of a newer format than this trimtab reads."""
    if type(format_version) is not int or format_version < 1:
        raise CheckpointError(
            f"{source}: format_version {format_version!r} of the trimtab checkpoint is not a version."
        )
    if format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} was written by trimtab {trimtab_version} in checkpoint format {format_version}; this trimtab "
            f"reads formats up to {FORMAT_VERSION}. Update with: pip install -U trimtab"
        )


def check_tensors(tensors: Mapping[str, StoredTensor], manifest: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError naming the tensors that are missing, added or not as they were saved."""
    saved: Mapping[str, str] = manifest["tensors"]
    if missing := sorted(set(saved) - set(tensors)):
        raise CheckpointError(f"{source}: the weights lack {_some(missing)}, which {MANIFEST} lists.")
    if added := sorted(set(tensors) - set(saved)):
        raise CheckpointError(f"{source}: the weights hold {_some(added)}, which {MANIFEST} does not list.")
    found = tensor_checksums(tensors)
    if changed := [name for name in tensors if found[name] != saved[name]]:
        raise CheckpointError(
            f"{source} is damaged: the bytes of {_some(changed)} in {tensors[changed[0]].file.name} are not those that "
            "were saved (checksum). Fetch or save it again."
        )


def check_files(directory: Path) -> None:
    """Raise CheckpointError unless every file is byte for byte as it was saved; stricter than loading is."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} has no {MANIFEST}, so it was not saved by trimtab and cannot be verified.")
    for name, saved in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks {name}, which {MANIFEST} lists.")
        if sha256_file(file) != saved:
            raise CheckpointError(f"{file} is not as it was saved (SHA-256 differs).")


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
