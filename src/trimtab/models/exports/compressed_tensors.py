"""compressed-tensors `pack-quantized`: what vLLM, SGLang and transformers read.

Of a layer NAME of shape [out, in], groups of g inputs, b bits:

    NAME.weight_packed      int32 [out, ceil(in b / 32)]       codes as a stream of bits along `in`
    NAME.weight_scale       fp16 or bf16 [out, in / g]         [out, 1] for the strategy "channel"
    NAME.weight_shape       int64 [2]                          out, in
    NAME.weight_zero_point  int32 [ceil(out b / 32), in / g]   asymmetric only; a stream of bits along `out`

The format calls its codes signed and stores `q + 2^(b-1)`; those are the codes and the zero points of our grids as
they are. Source: compressed-tensors 0.19, `compressors/pack_quantized`. Versions before the dense packing read 4 and 8
bits the same and 3 bits otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.models.exports.base import ExportFormat, Layer, Source, only_grid, scales_as
from trimtab.models.exports.bit_stream import pack_stream
from trimtab.models.exports.hf_directory import model_tensors, write_model
from trimtab.tensors.grid import GridFormat, GroupGrid

__all__ = ["CompressedTensors"]

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"
_VERSION = "0.19.0"
"""Of the library whose layout this is."""


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(ExportFormat):
    """One grid per layer, symmetric or not, at 2, 3, 4 or 8 bits; layers may differ. No options."""

    name: ClassVar[str] = METHOD

    def refusal(self, layer: Layer) -> str | None:
        grid = only_grid(layer)
        if isinstance(grid, str):
            return grid
        if layer.transposed:
            return "its family stores it as Conv1D, and readers of this format look for nn.Linear"
        if scales_as(grid, torch.float16, torch.bfloat16) is None:
            return f"part 0 of kind 'grid' has {grid.format.scale_dtype} scales that no 16-bit type holds exactly"
        return None

    def write(self, source: Source, path: Path, final: Path) -> list[dict[str, Any]]:
        write_model(source, path, model_tensors(source, _tensors), quantization_config(source))
        return [
            {"layer": name, "stored_as": f"int{grid_of(layer).format.bits}", "relative_error": 0.0}
            for name, layer in source.layers.items()
        ]


def grid_of(layer: Layer) -> GroupGrid:
    """The grid of a layer that was not refused."""
    grid = only_grid(layer)
    assert isinstance(grid, GroupGrid)
    return grid


def _tensors(layer: Layer) -> dict[str, Tensor]:
    grid = grid_of(layer)
    bits = grid.format.bits
    scales = scales_as(grid, torch.float16, torch.bfloat16)
    assert scales is not None
    tensors = {
        "weight_packed": pack_stream(grid.codes(), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(grid.shape, dtype=torch.int64),
    }
    if grid.zeros is not None:
        tensors["weight_zero_point"] = pack_stream(grid.zeros.t(), bits).t().contiguous()
    return tensors


def quantization_config(source: Source) -> dict[str, Any]:
    """`quantization_config` of config.json: one group for all layers, or one per kind of grid."""
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, layer in source.layers.items():
        kinds[_kind(grid_of(layer).format)].append(name)
    groups = {}
    for number, names in enumerate(kinds.values()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else targets(names),
            "weights": _weights(grid_of(source.layers[names[0]]).format),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": groups,
        "ignore": list(source.dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _kind(fmt: GridFormat) -> tuple[Any, ...]:
    return fmt.bits, fmt.symmetric, fmt.group_size


def _weights(fmt: GridFormat) -> dict[str, Any]:
    per_channel = fmt.group_size == -1
    weights: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": fmt.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if per_channel:
        del weights["group_size"]
    return weights


def targets(names: Iterable[str]) -> list[str]:
    """Regular expressions that match exactly these layers, one for all layers whose names differ in the block only."""
    numbers: Mapping[tuple[str, str], list[str]] = defaultdict(list)
    found = []
    for name in names:
        if split := re.match(r"(.*?\.)(\d+)(\..*)$", name):
            numbers[split[1], split[3]].append(split[2])
        else:
            found.append(f"re:^{re.escape(name)}$")
    for (before, after), blocks in numbers.items():
        found.append(f"re:^{re.escape(before)}({'|'.join(blocks)}){re.escape(after)}$")
    return found
