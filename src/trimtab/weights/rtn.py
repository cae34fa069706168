"""Round every weight to the nearest point of an integer grid with one scale per group; needs no data.

Paper: none of its own; the baseline of Frantar et al., "GPTQ", ICLR 2023, arXiv:2210.17323, and of most others since.

Per group of `group_size` columns of a row, with b bits:

    symmetric     s = max|w| / ((2^b - 1) / 2)       q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1)    w ~ s q
    asymmetric    s = (max - min) / (2^b - 1)        z = round(-min / s), 0 forced into the range
                  q = clip(round(w / s) + z, 0, 2^b - 1)                                              w ~ s (q - z)

The symmetric divisor is that of compressed-tensors (7.5 at 4 bits), so the largest positive weight may clip by half a
step. Rounding is half to even. Scales are rounded to their stored dtype before codes are computed.

`clip="mse"` shrinks each group's range by up to 20 % in steps of 1 % to the least sum |w - w~|^2.4; `clip="imatrix"` by
up to 95 % in 20 steps to the least sum E[x_j^2] |w - w~|^3, which needs calibration data.

With `activation_bits` the input of each layer is rounded too, per token as it comes, as QLLM (arXiv:2310.08041) and
others do before any remedy: the grid above over all channels of a token (trimtab.tensors.activations).

Cost: one pass over the weights. When it fails: at 3 bits and fewer, and at 4 bits where a few input channels are much
larger than the others; gptq at the same bytes is better there. With rounded inputs, wherever a few channels are large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid, quantize_codes
from trimtab.weights._grid import GridMethod
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Rtn"]


@dataclass(frozen=True, kw_only=True)
class Rtn(GridMethod, LinearMethod):
    """Round to nearest. Options of GridMethod, and:

    activation_bits    bits of the inputs, one step per token, and one zero point unless `symmetric`; None leaves them
    """

    activation_bits: Literal[4, 6, 8] | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"second_moment"} if self.clip == "imatrix" else ())

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        weight = linear.weight.detach().float()
        scales, zeros = self.parameters(weight, stats.second_moment if stats else None)
        codes = quantize_codes(weight, scales, zeros, self.format)
        transform = None
        if self.activation_bits is not None:
            transform = ActivationGrid(weight.shape[1], self.activation_bits, "token", self.symmetric)
        return CompressedTensor((GroupGrid.from_codes(codes, scales, zeros, self.format),), transform), {}
