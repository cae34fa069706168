"""GPTQ checkpoints (`quant_method: "gptq"`): the matrix transposed, codes in streams of bits along `in`.

Of a layer NAME of shape [out, in], groups of g inputs, b bits:

    NAME.qweight  int32 [in b / 32, out]       codes, packed along `in`
    NAME.qzeros   int32 [in / g, out b / 32]   zero points, packed along `out`
    NAME.scales   fp16 [in / g, out]
    NAME.g_idx    int32 [in]                   the group of each input, j // g

`w[o, j] = scales[k, o] (code - zero)`, k the group of j. Version 1 (`checkpoint_format: "gptq"`) stores zero - 1,
version 2 stores the zero. In version 1 a zero point of 0 would be stored as -1: some readers take the lowest b bits,
others read 2^b, so it is refused. All layers share bits, group size and symmetry, and readers expect every linear layer
of the blocks to be there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.errors import TargetError
from trimtab.models.exports.base import ExportFormat, Layer, Source, only_grid, scales_as
from trimtab.models.exports.bit_stream import pack_stream
from trimtab.models.exports.hf_directory import model_tensors, write_model
from trimtab.models.info import info_of
from trimtab.tensors.grid import GroupGrid

__all__ = ["GptqCheckpoint"]

METHOD = "gptq"
_DAMPING = 0.01
"""What `damp_percent` says where no GPTQ step of ours tells; readers take no notice of it."""


@dataclass(frozen=True, kw_only=True)
class GptqCheckpoint(ExportFormat):
    """One grid per layer, all alike, at 2, 3, 4 or 8 bits.

    checkpoint_format   gptq: version 1, which stores zero points less one; gptq_v2: as they are
    """

    name: ClassVar[str] = METHOD

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"

    def refusal(self, layer: Layer) -> str | None:
        grid = only_grid(layer)
        if isinstance(grid, str):
            return grid
        out_features, in_features = grid.shape
        if layer.transposed:
            return "its family stores it as Conv1D, and readers of this format look for nn.Linear"
        if scales_as(grid, torch.float16) is None:
            return f"part 0 of kind 'grid' has {grid.format.scale_dtype} scales that float16 does not hold exactly"
        if in_features * grid.format.bits % 32 or out_features * grid.format.bits % 32:
            return f"{grid.format.bits}-bit codes of a [{out_features}, {in_features}] layer do not fill 32-bit words"
        if grid.zeros is not None and self.checkpoint_format == "gptq" and not bool(grid.zeros.all()):
            return (
                "part 0 of kind 'grid' has zero points of 0, which version 1 stores as -1 and its readers read "
                "differently (checkpoint_format=gptq_v2 has no such gap)"
            )
        return None

    def check_source(self, source: Source) -> None:
        """Raise TargetError if the layers differ, or if a linear layer of the blocks is not compressed."""
        first = next(iter(source.layers.values()))
        wanted = _layout(first)
        for layer in source.layers.values():
            if _layout(layer) != wanted:
                raise TargetError(
                    f"gptq holds one layout for all layers, but '{first.name}' has {_words(first)} and '{layer.name}' "
                    f"has {_words(layer)}. compressed-tensors holds layers that differ."
                )
        head = source.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        named = dict(source.model.named_modules())
        if dense := [name for name in source.dense if named[name] is not head]:
            raise TargetError(
                f"gptq wants all linear layers of the blocks compressed, and '{dense[0]}' is not ({len(dense)} such). "
                "compressed-tensors holds models that are compressed in part."
            )

    def write(self, source: Source, path: Path, final: Path) -> list[dict[str, Any]]:
        config = self._config(source)
        write_model(source, path, model_tensors(source, self._tensors), config)
        (path / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        stored_as = f"int{config['bits']}"
        return [{"layer": name, "stored_as": stored_as, "relative_error": 0.0} for name in source.layers]

    def _tensors(self, layer: Layer) -> dict[str, Tensor]:
        grid = only_grid(layer)
        assert isinstance(grid, GroupGrid)
        bits, (_, in_features) = grid.format.bits, grid.shape
        scales = scales_as(grid, torch.float16)
        assert scales is not None
        zeros = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8) if grid.zeros is None else grid.zeros
        if self.checkpoint_format == "gptq":
            zeros = zeros - 1
        return {
            "qweight": pack_stream(grid.codes(), bits).t().contiguous(),
            "qzeros": pack_stream(zeros.t(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(in_features) // grid.format.group_length(grid.shape)).to(torch.int32),
        }

    def _config(self, source: Source) -> dict[str, Any]:
        bits, group_size, symmetric = _layout(next(iter(source.layers.values())))
        recipe = info_of(source.model).recipe
        steps = [] if recipe is None else recipe.to_dict()["steps"]
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.checkpoint_format,
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": symmetric,
            "damp_percent": next((step["percdamp"] for step in steps if "percdamp" in step), _DAMPING),
            "lm_head": False,
        }


def _layout(layer: Layer) -> tuple[int, int, bool]:
    grid = only_grid(layer)
    assert isinstance(grid, GroupGrid)
    return grid.format.bits, grid.format.group_size, grid.format.symmetric


def _words(layer: Layer) -> str:
    bits, group_size, symmetric = _layout(layer)
    return f"{bits} bits, group_size={group_size}, symmetric={symmetric}"
