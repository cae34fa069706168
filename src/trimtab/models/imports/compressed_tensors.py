"""compressed-tensors `pack-quantized`; the layout is described in models/exports/compressed_tensors.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.core.errors import CheckpointError
from trimtab.models.exports.bit_stream import stream_words, unpack_stream
from trimtab.models.exports.compressed_tensors import LAYOUT
from trimtab.models.imports.base import Reader, ReadLayer, checked_bits, checked_group, grid_of
from trimtab.tensors.grid import GroupGrid


class PackReader(Reader):
    """Reads integer weights with strategies "group" and "channel".

    A layer's settings are those of the group that names it most closely: by name, by pattern, by class.
    """

    codes = "weight_packed"
    buffers = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{source}: quantization_config has no 'config_groups'.")
        self._groups = list(groups.values())
        for group in self._groups:
            layout = group.get("format") or config.get("format")
            if layout != LAYOUT:
                raise CheckpointError(
                    f"{source}: compressed-tensors format '{layout}' cannot be read; known: {LAYOUT}."
                )
            if group.get("input_activations") or group.get("output_activations"):
                raise CheckpointError(f"{source}: quantized activations cannot be read, only quantized weights.")
        if any((config.get("transform_config") or {}).values()):
            raise CheckpointError(f"{source}: a transform_config cannot be read.")

    def grid(self, layer: ReadLayer) -> GroupGrid:
        weights, (out_features, in_features) = self._weights(layer.name), layer.shape
        bits, strategy = checked_bits(weights.get("num_bits")), weights.get("strategy")
        if strategy not in ("group", "channel") or weights.get("type", "int") != "int":
            raise CheckpointError(
                f"strategy '{strategy}' of type '{weights.get('type')}' cannot be read; read are integers with 'group' "
                "or 'channel'."
            )
        group_size = -1 if strategy == "channel" else checked_group(weights.get("group_size"), in_features)
        groups = 1 if group_size == -1 else in_features // group_size
        symmetric = bool(weights.get("symmetric", True))
        if "weight_g_idx" in layer.tensors and bool((layer.tensors["weight_g_idx"].diff() < 0).any()):
            raise CheckpointError(
                "its inputs are assigned to groups out of order (weight_g_idx), and trimtab's groups are neighbours. "
                "Quantize with actorder 'static' or none."
            )
        if layer.tensor("weight_shape", (2,)).tolist() != [out_features, in_features]:
            raise CheckpointError(f"'weight_shape' is not the [{out_features}, {in_features}] of the model.")
        packed = layer.tensor("weight_packed", (out_features, stream_words(in_features, bits)), torch.int32)
        scales = layer.scales("weight_scale", (out_features, groups))
        zeros = None
        if not symmetric:
            words = layer.tensor("weight_zero_point", (stream_words(out_features, bits), groups), torch.int32)
            zeros = unpack_stream(words.t().contiguous(), bits, out_features).t().contiguous()
        return grid_of(unpack_stream(packed, bits, in_features), scales, zeros, bits, group_size)

    def _weights(self, name: str) -> Mapping[str, Any]:
        ranked = [(_rank(str(t), name), group) for group in self._groups for t in group.get("targets", ())]
        found = [(rank, group) for rank, group in ranked if rank is not None]
        if not found:
            raise CheckpointError("no config group targets it.")
        weights: Mapping[str, Any] = min(found, key=lambda entry: entry[0])[1].get("weights") or {}
        return weights


def _rank(target: str, name: str) -> int | None:
    """How closely a target names a linear layer: 0 by its name, 1 by a pattern for its beginning, 2 by its class."""
    if target.startswith("re:"):
        return 1 if re.match(target.removeprefix("re:"), name) else None
    return {name: 0, "Linear": 2}.get(target)
