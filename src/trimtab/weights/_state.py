"""What a compression run has finished, on disk, so that a killed run continues where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.core.errors import CheckpointError
from trimtab.core.files import atomic_directory, sha256_file
from trimtab.models.run_state import RunState
from trimtab.tensors.compressed import CompressedTensor
from trimtab.weights._state_sliced import decoded, encoded, is_sliced
from trimtab.weights.base import Compressed, CompressedBlock, SlicedBlock


class State(RunState):
    """Finished blocks in a directory: `run.json`, then `block-0000/`, ... each written whole or not at all.

    A block directory holds `tensors.safetensors` (keys `<linear>:<buffer>`, and the names of dense parameters that
    changed with them) and `block.json` (spec and notes of each linear, and the hash of the tensors); for blocks that
    were sliced see `_state_sliced.py`.
    """

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
