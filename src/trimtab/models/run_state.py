"""The directory in which a run keeps what it has finished, so that a killed one continues where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.core.errors import CheckpointError
from trimtab.core.files import write_text_atomically

STATE_VERSION = 2


class RunState:
    """A directory whose `run.json` says which run it is of: recipe, model, calibration, seed, mode and versions."""

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
