"""Round every weight to the nearest NormalFloat level of its group: a table of quantiles of the normal distribution.

Paper: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
arXiv:2305.14314.

Per group of `group_size` weights, with b bits:

    s = max|w|        w~ = s * (the NF_b level nearest to w / s)

The table has 2^b levels from -1 to 1 with an exact 0. They are quantiles of the normal distribution, so on normally
distributed weights all codes are used about equally often. A value midway between two levels takes the lower. Scales
are rounded to their stored dtype before codes are computed.

`double_quant` stores each scale as an 8-bit code, with one float32 maximum for 256 of them: b + 0.127 bits per weight.

Departures from the paper: blocks lie along the columns of a row, which are the blocks of the flattened matrix wherever
`group_size` divides the width; scales are float16 (float32 there); double quantization codes the scales' distance to
their minimum uniformly, at the bytes of the paper's scheme, see tensors/nested_scales.py. 8 bits are LQ-LoRA's NF8.

Cost: one pass over the weights. When it fails: at 2 bits, where its four levels -1, 0, 0.34 and 1 leave more error than
a uniform grid with a zero point. Its levels need a lookup where a grid multiplies and adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.nested_scales import NestedFormat
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights._groups import GroupMethod
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Stats
    from trimtab.models.views import LinearView

__all__ = ["Nf"]


@dataclass(frozen=True, kw_only=True)
class Nf(GroupMethod, LinearMethod):
    """NormalFloat. Options of GroupMethod, and:

    double_quant   quantize the scales too: 8 bits each and a float32 for 256 of them
    scale_dtype    stored dtype of the scales without `double_quant`
    """

    double_quant: bool = False
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    @property
    def format(self) -> TableFormat:
        return TableFormat(
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
            nested=NestedFormat() if self.double_quant else None,
        )

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        return CompressedTensor(parts=(LevelTable.quantize(linear.weight, self.format),)), {}
