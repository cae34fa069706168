"""What a compression run has finished, on disk, so that a killed run continues where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from trimtab.core.errors import CheckpointError
from trimtab.core.files import atomic_directory, sha256_file, write_text_atomically
from trimtab.tensors.compressed import CompressedTensor
from trimtab.weights._state_sliced import decoded, encoded, is_sliced
from trimtab.weights.base import Compressed, CompressedBlock, SlicedBlock

STATE_VERSION = 2


class State:
    """Finished blocks in a directory: `run.json`, then `block-0000/`, ... each written whole or not at all.

    A block directory holds `tensors.safetensors` (keys `<linear>:<buffer>`, and the names of dense parameters that
    changed with them) and `block.json` (spec and notes of each linear, and the hash of the tensors); for blocks that
    were sliced see `_state_sliced.py`. `run.json` says which run it is: recipe, model, calibration, seed, mode and
    versions.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], *, discard: bool = False) -> None:
        """Open or begin. Raises OutputError, and CheckpointError if the directory holds the state of another run.

        With `discard`, the state of another run is removed instead; a directory that is no state never is.
        """
        self.path = Path(path)
        try:
            self._open(fingerprint)
        except CheckpointError:
            if not (discard and (self.path / "run.json").exists()):
                raise
            shutil.rmtree(self.path)
            self._open(fingerprint)

    def _open(self, fingerprint: Mapping[str, Any]) -> None:
        run = self.path / "run.json"
        text = json.dumps({"version": STATE_VERSION, **fingerprint}, indent=2, sort_keys=True) + "\n"
        if not run.exists():
            # hidden names are what a writer killed here left behind
            if self.path.exists() and not (
                self.path.is_dir() and all(p.name.startswith(".") for p in self.path.iterdir())
            ):
                raise CheckpointError(f"{self.path} is not the state of a compression run; give another directory.")
            write_text_atomically(run, text)
            return
        try:
            found = json.loads(run.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{run} cannot be read ({error}). Remove {self.path} to begin anew.") from None
        wanted = json.loads(text)  # as it would have been read: lists, not tuples
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self.path} holds an unfinished run with another {name}: {json.dumps(found.get(name))} there, "
                    f"{json.dumps(wanted.get(name))} now. Repeat that run to finish it, or remove the directory to "
                    "begin anew."
                )

    def save_block(self, index: int, block: CompressedBlock | SlicedBlock) -> None:
        """Write a finished block. Raises OutputError; what was finished before stays."""
        tensors, content = _encoded(block) if isinstance(block, CompressedBlock) else encoded(block)
        with atomic_directory(self._block(index), force=True) as directory:
            tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, directory / "tensors.safetensors")
            content["sha256"] = sha256_file(directory / "tensors.safetensors")
            (directory / "block.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

    def has_block(self, index: int) -> bool:
        return self._block(index).exists()

    def load_block(self, index: int) -> CompressedBlock | SlicedBlock:
        """A finished block. Raises CheckpointError if its files are damaged."""
        directory = self._block(index)
        try:
            content = json.loads((directory / "block.json").read_text(encoding="utf-8"))
            if sha256_file(directory / "tensors.safetensors") != content["sha256"]:
                raise CheckpointError("the checksum of tensors.safetensors does not match")
            tensors = load_file(directory / "tensors.safetensors")
            return decoded(tensors, content) if is_sliced(content) else _decoded(tensors, content)
        except (OSError, ValueError, KeyError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(
                f"finished block {directory} is damaged ({error}). Remove it to compute the block again."
            ) from None

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:04d}"


def _encoded(block: CompressedBlock) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        f"{name}:{key}": value for name, done in block.linears.items() for key, value in done.tensor.state().items()
    }
    entries = {n: {"spec": done.tensor.spec(), "notes": dict(done.notes)} for n, done in block.linears.items()}
    return {**tensors, **block.dense}, {"linears": entries}


def _decoded(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> CompressedBlock:
    grouped: dict[str, dict[str, torch.Tensor]] = {name: {} for name in content["linears"]}
    dense: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name, colon, buffer = key.rpartition(":")
        if colon:
            grouped[name][buffer] = value
        else:
            dense[key] = value
    linears = {
        name: Compressed(CompressedTensor.from_state(entry["spec"], grouped[name]), entry["notes"])
        for name, entry in content["linears"].items()
    }
    return CompressedBlock(linears, dense)


def model_sha256(model: PreTrainedModel) -> str:
    """Hex digest of a model's configuration and of the name, dtype, shape and bytes of all its tensors."""
    config = {
        k: v for k, v in model.config.to_diff_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
