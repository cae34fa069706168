"""Half-quadratic quantization: an integer grid whose fractional zero points are searched for; needs no data.

Paper: Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs 2023; code
github.com/mobiusml/hqq.

Per group, with the scale s of rtn kept, the zero point z is to lower `sum |w - w~|^p`, p < 1, which forgives the few
large errors. Half-quadratic splitting replaces the sum by errors e that are shrunk, and alternates, from the zero point
of rtn:

    q = clip(round(w / s + z), 0, 2^b - 1)        w~ = s (q - z)        d = w - w~
    e = sign(d) max(|d| - |d|^(p-1) / beta, 0)
    z = mean over the group of q - (w - e) / s    beta = kappa beta

until the mean |d| of the matrix stops falling, at most `iterations` times. The error counts in the units of the
weights, so with beta = 10 every |d| < 0.17, which is nearly every error of a language model, has e = 0: what remains is
the alternation of codes with the zero point of least squares.

Departures from the authors' code: each group keeps the best zero point it met, rtn's included, by the error of the
codes and the float16 zero point that are stored; so no group ends with a larger L_p error than with rtn on the same
grid. The range includes 0 (rtn's does). Scales are float16, rounded before codes are computed.

Cost: `iterations` passes over the weights. A zero point takes 16 bits where that of rtn takes 8: 0.125 bits per weight
more in groups of 64. When it fails: where rtn does, on inputs much larger than others; it knows the weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid, column_codes, column_values, grid_parameters, quantize_codes
from trimtab.weights._groups import GroupMethod
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Stats
    from trimtab.models.views import LinearView

__all__ = ["Hqq"]


@dataclass(frozen=True, kw_only=True)
class Hqq(GroupMethod, LinearMethod):
    """Half-quadratic quantization. Options of GroupMethod, and:

    p              the norm whose p-th power is lowered, in (0, 1]
    beta           weight of the quadratic term at first
    kappa          factor of beta from one iteration to the next
    iterations     at most; 0 is rtn with zero points in 16 bits
    scale_dtype    stored dtype of the scales
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def check(self) -> None:
        super().check()
        for name, fits, allowed in (
            ("p", 0 < self.p <= 1, "above 0 and at most 1"),
            ("beta", self.beta > 0, "positive"),
            ("kappa", self.kappa >= 1, "at least 1"),
            ("iterations", self.iterations >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(f"Hqq: option {name}={getattr(self, name)} must be {allowed}.")

    @property
    def format(self) -> GridFormat:
        return GridFormat(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=False,
            scale_dtype=self.scale_dtype,
            zero_dtype="float16",
        )

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        weight, fmt = linear.weight.float(), self.format
        scales, start = grid_parameters(weight, replace(fmt, zero_dtype="uint8"))
        assert start is not None
        zeros, used = self._search(weight.reshape(*scales.shape, -1), scales[:, :, None], start.half()[:, :, None])
        grid = GroupGrid.from_codes(quantize_codes(weight, scales, zeros, fmt), scales, zeros, fmt)
        return CompressedTensor(parts=(grid,)), {"iterations": used}

    def _search(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, int]:
        """The best zero points, float16 [out, groups], of weight [out, groups, length], and the iterations it took.

        `scales` and the first `zeros` are [out, groups, 1], as they are stored.
        """
        fmt, beta = self.format, self.beta
        best, best_error = zeros, torch.full(zeros.shape[:2], torch.inf, device=weight.device)
        last_mean = torch.inf
        for iteration in range(self.iterations + 1):
            codes = column_codes(weight, scales, zeros, fmt)
            error = weight - column_values(codes, scales, zeros, fmt)
            size = error.abs()
            total = size.pow(self.p).sum(dim=2)
            best = torch.where((total < best_error)[:, :, None], zeros, best)
            best_error = torch.minimum(best_error, total)
            mean = float(size.mean())
            if mean >= last_mean or iteration == self.iterations:
                break
            last_mean = mean
            shrunk = error.sign() * (size - size.pow(self.p - 1) / beta).clamp_(min=0)
            zeros = (codes.float() - (weight - shrunk) / scales.float()).mean(dim=2, keepdim=True).half()
            beta *= self.kappa
        return best[:, :, 0], iteration
