"""Caches on disk: one safetensors file with the runs as they are in memory, and a JSON entry that says what they are.

    metadata   "trimtab_cache": JSON of method, options, fingerprints, layers; "digest": of that JSON and of all tensors
    tensors    each once, however many runs and rows refer to it

Runs refer to tensors by name, rows to runs by number, so what was shared is shared again after loading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import trimtab
from trimtab.cache._making import cache_plan
from trimtab.core.errors import CheckpointError, CompositionError, ConfigError, DataError, OutputError, TrimtabError
from trimtab.core.files import atomic_file
from trimtab.core.registry import method_class, methods
from trimtab.kernels.kv_attention import Run
from trimtab.models.checkpoint import read_header
from trimtab.models.info import stored_tensors
from trimtab.models.segments import CachePlan, SegmentCache
from trimtab.models.segments.checking import check_run
from trimtab.models.segments.group import Group
from trimtab.models.segments.layer import SegmentLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
_ENTRY, _DIGEST = "trimtab_cache", "digest"
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_SAMPLE = 64


def save(cache: SegmentCache, path: str | Path) -> Path:
    """Write a cache to a file, from which `load` makes one that goes on bit for bit the same. Returns the path.

    What stood at `path` stays whole until the new file is complete. Raises CompositionError for a cache that no method
    makes, or with an open draft; OutputError if the file cannot be written.
    """
    path = Path(path).expanduser()
    if cache.in_transaction:
        raise CompositionError("the cache has an open draft; commit or roll it back before saving.")
    _check_reproducible(cache)
    names = _Names()
    entry = {
        "format_version": FORMAT_VERSION,
        "trimtab_version": trimtab.__version__,
        "method": cache.plan.name,
        "options": cache.plan.options,
        "plan": plan_fingerprint(cache.plan),
        "model": model_fingerprint(cache.model),
        "layers": [_layer_entry(layer, names) for layer in cache.segment_layers if layer.is_initialized],
        "key_bias": {str(layer): names.of(bias) for layer, bias in cache.key_bias.items()},
        "runs": names.runs,
    }
    text = json.dumps(entry)
    metadata = {_ENTRY: text, _DIGEST: _digest(text, names.tensors)}
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give the name of a file.")
    with atomic_file(path, also=(SafetensorError,)) as partial:
        save_file(names.tensors, partial, metadata=metadata)
    return path


def load(path: str | Path, model: PreTrainedModel) -> SegmentCache:
    """The cache in a file, for the model that it was made with.

    Raises CheckpointError if the file is missing, damaged or newer than this trimtab, if its method is unknown, if the
    model is another, or if the method has learnt other tables for it since.
    """
    path = Path(path).expanduser()
    entry, tensors = _read(path)
    method = _method(entry, path)
    if entry.get("model") != model_fingerprint(model):
        raise CheckpointError(f"{path} holds the cache of another model than this {type(model).__name__}.")
    try:
        plan = cache_plan(method, model)
    except TrimtabError as error:
        raise CheckpointError(f"{path}: its method does not fit this model: {error}") from None
    if entry.get("plan") != plan_fingerprint(plan):
        raise CheckpointError(
            f"{path} was made by '{plan.name}' with other tables than it has for this model now. Load the model from "
            "the directory it was saved to after the method was fitted."
        )
    cache = SegmentCache(model, plan)
    try:
        runs = [
            Run.from_state(spec["spec"], {name: tensors[key] for name, key in spec["tensors"].items()})
            for spec in entry["runs"]
        ]
        layers = entry["layers"]
        if len(layers) not in (0, len(cache.segment_layers)):
            raise DataError(f"it has {len(layers)} layers, the model {len(cache.segment_layers)}.")
        for layer, saved in zip(cache.segment_layers, layers, strict=False):
            _fill_layer(layer, saved, runs, tensors, model.device)
        cache.key_bias = {int(layer): tensors[key].to(model.device) for layer, key in entry["key_bias"].items()}
    except (AttributeError, DataError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return cache


def plan_fingerprint(plan: CachePlan) -> str:
    """A digest of all that a plan says, fitted tables included."""
    digest = hashlib.blake2b(digest_size=16)
    for text in _described((plan.name, plan.layers)):
        digest.update(text)
    return digest.hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's shape and of a few numbers of each of its tensors."""
    config = model.config.get_text_config()
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    digest = hashlib.blake2b(json.dumps([type(model).__name__, shape]).encode(), digest_size=16)
    for name, tensor in stored_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor.detach().flatten()[:_SAMPLE]))
    return digest.hexdigest()


class _Names:
    """Tensors and runs to write, each once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.runs: list[dict[str, Any]] = []
        self._places: dict[tuple[object, ...], str] = {}
        self._numbers: dict[int, int] = {}

    def of(self, tensor: Tensor) -> str:
        """The name of a tensor in the file."""
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in self._places or not tensor.numel():
            self._places[place] = f"t{len(self.tensors)}"
            # a copy where it is a slice: the format wants tensors that lie alone
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            self.tensors[self._places[place]] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        return self._places[place]

    def number(self, run: Run) -> int:
        """The number of a run in the file."""
        if id(run) not in self._numbers:
            self._numbers[id(run)] = len(self.runs)
            tensors = {name: self.of(tensor) for name, tensor in run.tensors().items()}
            self.runs.append({"spec": run.spec(), "tensors": tensors})
        return self._numbers[id(run)]


def _layer_entry(layer: SegmentLayer, names: _Names) -> dict[str, Any]:
    return {
        "dtype": str(layer.dtype).removeprefix("torch."),
        "length": layer.length,
        "lengths": layer.lengths,
        "first": layer.first,
        "sliding_window": layer.sliding_window,
        "groups": [
            {
                "forgotten": group.forgotten,
                "pivots": [None if own is None else own.tolist() for own in group.pivots],
                "sides": [
                    [
                        {"runs": [names.number(run) for run in side.runs[row]], "window": names.of(side.window(row))}
                        for row in range(side.rows)
                    ]
                    for side in group.sides
                ],
            }
            for group in layer.groups
        ],
    }


def _fill_layer(
    layer: SegmentLayer,
    saved: Mapping[str, Any],
    runs: list[Run],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    rows, groups = len(saved["lengths"]), saved["groups"]
    if not rows or len(saved["first"]) != rows or len(groups) != len(layer.plan):
        raise DataError(f"layer {layer.index} has {rows} rows and {len(groups)} groups of heads.")
    shape = sum(len(plan.heads) for plan in layer.plan)
    first_window = tensors[groups[0]["sides"][0][0]["window"]]
    like = torch.empty((rows, shape, 0, first_window.shape[-1]), dtype=getattr(torch, saved["dtype"]))
    layer.lazy_initialization(like.to(device), like.to(device))
    layer.length, layer.lengths, layer.first = int(saved["length"]), list(saved["lengths"]), list(saved["first"])
    layer.sliding_window = saved["sliding_window"]
    for group, own in zip(layer.groups, groups, strict=True):
        _fill_group(group, own, runs, tensors, layer)


def _fill_group(
    group: Group, saved: Mapping[str, Any], runs: list[Run], tensors: Mapping[str, Tensor], layer: SegmentLayer
) -> None:
    group.forgotten = [int(n) for n in saved["forgotten"]]
    group.pivots = [None if own is None else torch.tensor(own, dtype=torch.long) for own in saved["pivots"]]
    for side, rows in zip(group.sides, saved["sides"], strict=True):
        windows = [tensors[row["window"]] for row in rows]
        heads, dim = side.buffer.shape[1], side.buffer.shape[3]
        longest = max(window.shape[1] for window in windows)
        padded = torch.zeros((len(rows), heads, longest, dim), dtype=layer.dtype, device=layer.device)
        for index, (window, row) in enumerate(zip(windows, rows, strict=True)):
            if window.dtype != layer.dtype or (window.shape[0], window.shape[2]) != (heads, dim):
                raise DataError(f"layer {layer.index} has a window {window.dtype} {list(window.shape)}.")
            padded[index, :, : window.shape[1]] = window
            for number in row["runs"]:
                check_run(runs[number], heads, dim)
                side.push(index, runs[number])
        side.append(padded, [list(range(window.shape[1])) for window in windows])
    for row, length in enumerate(layer.lengths):
        held = {side.encoded[row] + side.window_tokens(row) for side in group.sides}
        if len(held) != 1 or max(held) + group.forgotten[row] > length:
            raise DataError(f"layer {layer.index}, row {row} holds {sorted(held)} of {length} tokens.")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON entry and the tensors of a file, both as they were written. Raises CheckpointError."""
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if _ENTRY not in metadata:
        raise CheckpointError(f"{path} is no cache: trimtab.cache.save() did not write it.")
    try:
        entry = json.loads(metadata[_ENTRY])
        version = entry["format_version"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: its description cannot be read.") from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by trimtab {entry.get('trimtab_version')} in cache format {version}; this trimtab "
            f"reads formats up to {FORMAT_VERSION}. Update with: pip install -U trimtab"
        )
    if metadata.get(_DIGEST) != _digest(metadata[_ENTRY], tensors):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was saved (checksum). Fetch or save it again."
        )
    return entry, tensors


def _method(entry: Mapping[str, Any], path: Path) -> Any:
    try:
        found = method_class(str(entry.get("method")))
        if getattr(found, "room", None) != "cache":
            raise ConfigError(f"'{entry.get('method')}' is no cache.")
        return found.from_options(entry.get("options"))  # type: ignore[attr-defined]
    except (TrimtabError, TypeError) as error:
        raise CheckpointError(f"{path}: its method cannot be used here: {error}") from None


def _check_reproducible(cache: SegmentCache) -> None:
    """Raise CompositionError unless the method that the plan names makes this plan."""
    name = cache.plan.name
    if name in methods() and methods()[name].room == "cache":
        try:
            plan = cache_plan(method_class(name).from_options(cache.plan.options), cache.model)  # type: ignore[attr-defined]
            if plan_fingerprint(plan) == plan_fingerprint(cache.plan):
                return
        except ConfigError:
            pass
    raise CompositionError(
        f"this cache has a plan of its own, '{name}', which no cache method makes with these options for this model, "
        "so it could not be loaded again. Save caches that method.new(model) made."
    )


def _described(value: object) -> Iterator[bytes]:
    """All that a plan says, as bytes that are equal if and only if it is."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)} ".encode()
        yield _bytes(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for field in dataclasses.fields(value):
            yield f" {field.name}=".encode()
            yield from _described(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        yield f"[{len(value)}:".encode()
        for item in value:
            yield from _described(item)
    else:
        yield f"{value!r};".encode()


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} ".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
