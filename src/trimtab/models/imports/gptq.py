"""GPTQ checkpoints, versions 1 and 2; the layout is described in models/exports/gptq.py.

In version 1 a stored zero of 2^b - 1 is read as 0: writers mean a zero point of 0, less one, in b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trimtab.core.errors import CheckpointError
from trimtab.models.exports.bit_stream import stream_words, unpack_stream
from trimtab.models.imports.base import Reader, ReadLayer, checked_bits, checked_group, grid_of
from trimtab.tensors.grid import GroupGrid

_VERSIONS = ("gptq", "gptq_v2")


class GptqReader(Reader):
    """Reads qweight, qzeros, scales and g_idx. Inputs in another order than that of their groups are refused."""

    codes = "qweight"
    buffers = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if self._version not in _VERSIONS:
            raise CheckpointError(
                f"{source}: checkpoint_format '{self._version}' cannot be read; known: {', '.join(_VERSIONS)}."
            )
        if config.get("dynamic"):
            raise CheckpointError(f"{source}: layers with settings of their own ('dynamic') cannot be read.")
        self._bits = config.get("bits")
        self._group_size = config.get("group_size", -1)
        self._symmetric = bool(config.get("sym", True))

    def grid(self, layer: ReadLayer) -> GroupGrid:
        """The grid; symmetric if the configuration says so and all zero points agree."""
        bits, (out_features, in_features) = checked_bits(self._bits), layer.shape
        group_size = checked_group(self._group_size, in_features)
        length = in_features if group_size == -1 else group_size
        groups = in_features // length
        qweight = layer.tensor("qweight", (stream_words(in_features, bits), out_features), torch.int32)
        qzeros = layer.tensor("qzeros", (groups, stream_words(out_features, bits)), torch.int32)
        scales = layer.scales("scales", (groups, out_features))
        if "g_idx" in layer.tensors:
            order = layer.tensor("g_idx", (in_features,))
            if not torch.equal(order.long(), torch.arange(in_features) // length):
                raise CheckpointError(
                    "its inputs are assigned to groups out of order (g_idx, desc_act=true), and trimtab's groups are "
                    "neighbours. Quantize with static groups or desc_act=false."
                )
        zeros = unpack_stream(qzeros, bits, out_features)
        if self._version == "gptq":
            zeros = (zeros + 1) & (1 << bits) - 1
        symmetric = self._symmetric and bool((zeros == 1 << bits - 1).all())
        codes = unpack_stream(qweight.t().contiguous(), bits, in_features)
        own_zeros = None if symmetric else zeros.t().contiguous()
        return grid_of(codes, scales.t().contiguous(), own_zeros, bits, group_size)
