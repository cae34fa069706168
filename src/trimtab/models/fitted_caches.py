"""What cache methods have learnt from text, as a file of a checkpoint, tied to the weights it was learnt for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import CheckpointError

FILE = "trimtab_caches.safetensors"
_WEIGHTS = "weights"


def write_fitted(directory: Path, fitted: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, str]) -> None:
    """Write `fitted` (key of method and options -> named tensors) beside weights with these checksums; or nothing."""
    tensors = {
        f"{key}/{name}": t.detach().cpu().contiguous().clone() for key, own in fitted.items() for name, t in own.items()
    }
    if tensors:
        save_file(tensors, directory / FILE, metadata={_WEIGHTS: _digest(weights)})


def read_fitted(directory: Path, weights: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The inverse; empty if there is no such file. Raises CheckpointError if it is damaged or of other weights."""
    file = directory / FILE
    found: dict[str, dict[str, Tensor]] = {}
    if not file.exists():
        return found
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get(_WEIGHTS) != _digest(weights):
                raise CheckpointError(
                    f"{file} holds tables of caches that were fitted for another model. Remove the file, and fit "
                    f"them again "
                    "with: trimtab fit"
                )
            for full_name in sorted(stored.keys()):
                key, _, name = full_name.partition("/")
                found.setdefault(key, {})[name] = stored.get_tensor(full_name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Save the model again.") from None
    return found


def _digest(weights: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(weights), sort_keys=True).encode()).hexdigest()
