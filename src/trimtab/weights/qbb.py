"""Write every weight as a sum of a few signs times one scale per row and base; needs no data.

Paper: Bulat, Ouali, Tzimiropoulos, "QBB: Quantization with Binary Bases for LLMs", NeurIPS 2024.

    W ~ sum_{i=1..N} alpha_i B_i,     B_i in {-1, +1}^[out, in],  alpha_i in R^[out]

1. Greedy start: `B_i = sign(D_i)`, `alpha_i[o] = mean_j |D_i[o, j]|`, `D_{i+1} = D_i - alpha_i B_i`, `D_1 = W`.
2. Refinement of the matrix, without inputs. `refine="alternating"`: scales by least squares given the signs, then the
   nearest of all 2^N sign combinations for each weight, 15 rounds. `refine="gradient"`: the paper's progressive
   straight-through training, one base after another, all scales throughout.
3. Holistic calibration without data (`holistic`): the original model writes sequences, those on which the compressed
   model differs most are kept, and the scales of all layers, the signs frozen, are trained together to give the
   original's logits and block outputs. See _binary_distillation.py.

The authors published no code, and what follows is ours: alternating refinement is the default, because on weights of
real models it reaches a third of the error of straight-through training, which hardly improves on least squares for
the greedy signs; the scales are means over a row's inputs, as they have one entry per output; `constant` adds one
number per row, with which N bases contain every N-bit uniform grid of a row; all sizes and rates of stage 3.
`start="gptq"` begins from what GPTQ makes of the layer at 4 bits (which needs text), as the paper recommends.

Bits per weight: N + 16 N / in, or 16 (N + 1) / in with `constant`. A row has N multiplications instead of `in`; on
processors whose multiplications are free that is no gain, and the kernel looks levels up in a table.
When it fails: at 2 bases and where weights of a row differ much in scale, since there are no groups; a grid with
groups is then better at equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from trimtab.core.errors import ConfigError
from trimtab.tensors.binary import BinaryBases
from trimtab.tensors.compressed import CompressedTensor
from trimtab.weights._binary_fit import alternate, by_gradient, greedy
from trimtab.weights.base import LinearMethod, Notes
from trimtab.weights.gptq import Gptq

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView
    from trimtab.weights._tuning import Tuning

__all__ = ["Qbb"]


@dataclass(frozen=True, kw_only=True)
class Qbb(LinearMethod):
    """Binary bases.

    bits             N, the number of bases: 2, 3 or 4
    refine           stage 2: "alternating", "gradient" or "none"
    rounds           most rounds of alternating refinement
    constant         one number more per row
    start            what the bases are fitted to: the "weights", or what "gptq" makes of them at 4 bits
    holistic         stage 3
    sequences        that the original model writes for stage 3
    length           tokens of each
    keep_fraction    of them, those with the largest difference in logits, are trained on
    epochs           of stage 3
    learning_rate    of stage 3, relative to each layer's mean |alpha|: Adam, cosine decay
    scale_dtype      stored dtype of the scales
    """

    bits: Literal[2, 3, 4] = 4
    refine: Literal["alternating", "gradient", "none"] = "alternating"
    rounds: int = 15
    constant: bool = False
    start: Literal["weights", "gptq"] = "weights"
    holistic: bool = True
    sequences: int = 256
    length: int = 128
    keep_fraction: float = 0.25
    epochs: int = 3
    learning_rate: float = 1e-2
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def check(self) -> None:
        for name in ("rounds", "sequences", "length", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Qbb: option {name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.keep_fraction <= 1:
            raise ConfigError(f"Qbb: option keep_fraction={self.keep_fraction} must be above 0 and at most 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"Qbb: option learning_rate={self.learning_rate} must be positive.")
        if self.constant and self.refine != "alternating":
            raise ConfigError(f"Qbb: option constant=true needs refine=alternating, not {self.refine}.")

    @property
    def needs(self) -> frozenset[Need]:
        return Gptq().needs if self.start == "gptq" else frozenset()

    @property
    def tunes(self) -> bool:
        return self.holistic

    def check_linear(self, linear: LinearView) -> None:
        """Every shape fits: scales belong to whole rows."""

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        weight = linear.weight.detach().float()
        notes: Notes = {}
        if self.start == "gptq":
            rounded, notes = Gptq(bits=4, group_size=-1).compress(linear, stats)
            weight = rounded.dequantize()
        fitted = greedy(weight, self.bits)
        notes["greedy_relative_weight_error"] = float(fitted.row_errors(weight).sum() / weight.square().sum())
        if self.refine == "alternating":
            fitted = alternate(weight, fitted, self.rounds, constant=self.constant)
        elif self.refine == "gradient":
            fitted = by_gradient(weight, fitted)
        dtype = getattr(torch, self.scale_dtype)
        constant = None if fitted.constant is None else fitted.constant.to(dtype)
        if self.refine == "none":
            part = BinaryBases.from_signs(fitted.signs, fitted.alphas.to(dtype))
        else:
            part = BinaryBases.nearest(weight, fitted.alphas.to(dtype), constant)
        return CompressedTensor((part,)), notes

    def tune(self, tuning: Tuning) -> Notes:
        from trimtab.weights._binary_distillation import distil

        return distil(self, tuning)
