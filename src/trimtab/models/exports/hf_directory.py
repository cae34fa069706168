"""A Hugging Face directory written tensor by tensor, so that no second copy of the model is held."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.checkpoint import WEIGHTS, WEIGHTS_INDEX
from trimtab.models.exports.base import Layer, Source
from trimtab.models.info import info_of, stored_tensors

SHARD_BYTES = 5 * 10**9


def model_tensors(source: Source, replace: Callable[[Layer], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Name -> tensor of the whole model, with what `replace` makes of a compressed layer in that layer's place.

    `replace` returns tensors by the last part of their name ("weight_packed"). Biases stay as they are.
    """
    done: set[str] = set()
    for name, tensor in stored_tensors(source.model).items():
        owner, _, leaf = name.rpartition(".")
        layer = source.layers.get(owner)
        if layer is None or leaf == "bias":
            yield name, tensor.detach()
        elif owner not in done:
            done.add(owner)
            for written, value in replace(layer).items():
                yield f"{owner}.{written}", value


def write_model(
    source: Source,
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    quantization_config: Mapping[str, Any] | None,
) -> None:
    """Configuration, tokenizer and weights into `directory`, which exists and is empty; at most one shard in memory.

    Raises OSError also where a library has an error of its own for a disk that refuses.
    """
    _write_config(source.model, directory, quantization_config)
    if source.model.can_generate():
        source.model.generation_config.save_pretrained(directory)
    if (tokenizer := info_of(source.model).tokenizer) is not None:
        with disk_errors():
            tokenizer.save_pretrained(directory)
    with disk_errors():
        _write_weights(directory, tensors)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns the errors in which safetensors and tokenizers say that the disk refuses into OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:  # the latter is all that tokenizers raises
            raise OSError(str(error)) from error
        raise


def _write_config(model: PreTrainedModel, directory: Path, quantization_config: Mapping[str, Any] | None) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if quantization_config is not None:
        path = directory / "config.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        data["quantization_config"] = dict(quantization_config)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, SHARD_BYTES):
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        file = directory / f"shard-{len(shards)}"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, file, metadata={"format": "pt"})
        file.chmod((directory / "config.json").stat().st_mode)  # safetensors makes them readable by their owner only
    if len(shards) == 1:
        (directory / "shard-1").rename(directory / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard
