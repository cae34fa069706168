"""GGUF, the file of llama.cpp: weights in blocks, hyperparameters and the tokenizer.

Grids whose codes and scales a block type holds carry over code by code; other compressed weights are written as the
nearest blocks of a type that is asked for, and the error of that is reported. Layouts: gguf_blocks.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, MissingExtra
from trimtab.models.exports.base import ExportFormat, Layer, Source, only_grid, rounded_input
from trimtab.models.exports.gguf_blocks import TYPES, Blocks
from trimtab.models.exports.gguf_exact import exact_blocks, smallest_exact
from trimtab.models.exports.gguf_model import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    hyperparameters,
    rope_factors,
    row_order,
    written_name,
)
from trimtab.models.exports.gguf_projection import project_blocks
from trimtab.models.exports.gguf_tokenizer import Vocabulary, vocabulary_of
from trimtab.models.info import info_of, stored_tensors

__all__ = ["Gguf"]

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Gguf(ExportFormat):
    """One file for llama.cpp.

    type       of the compressed layers. exact: for each layer the smallest block type that holds its codes and scales
               as they are; a layer that none holds is refused. Any other: that type; where it does not hold the
               grid's codes, the nearest blocks are written and their error is reported
    fallback   type of layers whose inputs the blocks of `type` do not divide; without it they are refused
    dense      type of embeddings, output head and other uncompressed matrices; without it the model's own
    tokenizer  model: the model's; none: no tokenizer, llama.cpp then takes token ids
    """

    name: ClassVar[str] = "gguf"
    marker: ClassVar[str | None] = None

    type: Literal["exact", "q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q6_k", "q8_0", "f16", "bf16", "f32"] = "exact"
    fallback: Literal["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"] | None = None
    dense: Literal["f16", "bf16", "f32"] | None = None
    tokenizer: Literal["model", "none"] = "model"

    def refusal(self, layer: Layer) -> str | None:
        if reason := rounded_input(layer):
            return reason
        if self.type != "exact":
            try:
                self._type_for(layer.tensor.shape[1])
            except ConfigError as error:
                return str(error)
            return None
        grid = only_grid(layer)
        if isinstance(grid, str):
            return f"{grid} as it is (type=q8_0 writes its nearest blocks)"
        if smallest_exact(grid) is None:
            fmt = grid.format
            return (
                f"no block type holds part 0 of kind 'grid' as it is: {fmt.bits} bits, symmetric={fmt.symmetric}, "
                f"groups of {fmt.group_length(grid.shape)}, {fmt.scale_dtype} scales. Blocks are 32 or 256 inputs "
                "with fp16 scales (type=q8_0 writes the nearest)"
            )
        return None

    @classmethod
    def offer(cls, layer: Layer, source: Source) -> str | None:
        if source.model.config.model_type not in ARCHITECTURES:
            return None
        if cls().refusal(layer) is None:
            return cls.name
        return None if rounded_input(layer) else "gguf (nearest blocks, with type=q8_0)"

    def check_source(self, source: Source) -> None:
        """Raise MissingExtra without the package, TargetError and ConfigError for what llama.cpp would read wrongly."""
        _library()
        architecture = architecture_of(source.model.config)
        for name in source.layers:
            written_name(f"{name}.weight", architecture)
        self._vocabulary(source)

    def write(self, source: Source, path: Path, final: Path) -> list[dict[str, Any]]:
        gguf = _library()
        model, config = source.model, source.model.config
        architecture = architecture_of(config)
        entries: list[dict[str, Any]] = []
        # tensors wait on disk, not in memory
        with closing(gguf.GGUFWriter(path, architecture.name, use_temp_file=True)) as writer:
            for method, value in hyperparameters(config, architecture).items():
                getattr(writer, method)(value)
            _add_vocabulary(writer, self._vocabulary(source))
            if (factors := rope_factors(model)) is not None:
                writer.add_tensor("rope_freqs.weight", factors.numpy())
            for name, data, kind in self._tensors(source, architecture, entries):
                writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return entries

    def _vocabulary(self, source: Source) -> Vocabulary | None:
        if self.tokenizer == "none":
            return None
        tokenizer = info_of(source.model).tokenizer
        if tokenizer is None:
            raise ConfigError(
                "gguf: the model has no tokenizer. Set model.trimtab.tokenizer, or write none with tokenizer=none."
            )
        return vocabulary_of(tokenizer, source.model.config.vocab_size)

    def _tensors(
        self, source: Source, architecture: Architecture, entries: list[dict[str, Any]]
    ) -> Iterator[tuple[str, Tensor, str]]:
        """(name in the file, data, type in the file) of all tensors; adds to `entries` for compressed layers."""
        config = source.model.config
        dense = self.dense or {dtype: name for name, dtype in _FLOATS.items()}.get(source.model.dtype, "f32")
        done: set[str] = set()
        for name, tensor in stored_tensors(source.model).items():
            owner, _, leaf = name.rpartition(".")
            layer = source.layers.get(owner)
            if layer is None or leaf == "bias":
                order = row_order(name, architecture, config)
                values = tensor.detach() if order is None else tensor.detach()[order]
                kind = dense if values.ndim > 1 else "f32"
                yield written_name(name, architecture), _float_bytes(values, kind), kind.upper()
            elif owner not in done:
                done.add(owner)
                data, kind, error = self._layer_data(layer)
                entries.append({"layer": owner, "stored_as": kind, "relative_error": error})
                order = row_order(f"{owner}.weight", architecture, config)
                kind = f"{kind[:-1]}K" if kind.endswith("_k") else kind
                yield (
                    written_name(f"{owner}.weight", architecture),
                    data if order is None else data[order],
                    kind.upper(),
                )

    def _layer_data(self, layer: Layer) -> tuple[Tensor, str, float]:
        """(rows of bytes or numbers, type, relative error) of a compressed layer."""
        grid, shape = only_grid(layer), layer.tensor.shape
        kind = None if self.type == "exact" else self._type_for(shape[1])
        blocks: Blocks | None = None
        if not isinstance(grid, str):
            blocks = smallest_exact(grid) if kind is None else exact_blocks(grid, kind) if kind in TYPES else None
        weight = layer.tensor.dequantize()
        if blocks is None:
            assert kind is not None
            if kind in _FLOATS:
                return _float_bytes(weight, kind), kind, _error(weight.to(_FLOATS[kind]).float(), weight)
            blocks = project_blocks(weight, kind)
        return blocks.tobytes(shape[0]), blocks.type.name, _error(blocks.values(shape), weight)

    def _type_for(self, in_features: int) -> str:
        """`type`, or `fallback` where its blocks do not divide the inputs. Raises ConfigError if neither fits."""
        for kind in (self.type, self.fallback):
            if kind is not None and (kind not in TYPES or in_features % TYPES[kind].size == 0):
                return kind
        size = TYPES[self.type].size
        smaller = "q8_0" if in_features % TYPES["q8_0"].size == 0 else "f16"
        raise ConfigError(
            f"blocks of {self.type} have {size} inputs, which do not divide {in_features} (fallback={smaller} writes "
            "such layers in another type)"
        )


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtra("gguf", "gguf", "writing GGUF files") from None


def _float_bytes(values: Tensor, kind: str) -> Tensor:
    data = values.to(_FLOATS[kind]).contiguous()
    return data.view(torch.uint8) if kind == "bf16" else data  # numpy has no bfloat16: its bytes


def _error(found: Tensor, wanted: Tensor) -> float:
    norm = float(wanted.norm())
    return float((found - wanted).norm()) / norm if norm else 0.0


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
