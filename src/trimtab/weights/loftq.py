"""Quantized weight and low-rank correction chosen together, so that their sum is close to the weight.

Paper: Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
Models", ICLR 2024, arXiv:2310.08659.

Lowers `|W - Q - A B^T|_F` by turns, `iterations` times, beginning with A B^T = 0:

    Q_t = quantize(W - A_{t-1} B_{t-1}^T)
    A_t B_t^T = SVD_r(W - Q_t)

What is stored are the codes of a Q_t as they were computed and the factors of the same turn. Kept frozen and trained
factors serve as a LoRA adapter over Q that starts near W, where LoRA on a quantized weight starts at Q(W); untrained,
they are a correction that costs `16 r (out + in) / (out in)` bits per weight.

Quantizers: `nf`, NormalFloat in groups; `uniform`, the paper's, one range for the whole matrix, mean +- 2 standard
deviations, its scale and fractional zero point repeated for each row; `grid`, the integer grid of rtn, which other
programs can read.

Departures from the paper: the best turn is kept, not the last (the error is not monotone at 2 bits). Scales and factors
are rounded to their stored dtypes before the next turn sees them. Groups run along rows, as in nf. `init="svd"` begins
with A B^T = SVD_r(W), the order of LQ-LoRA (arXiv:2311.12023), which finds large low-rank parts of W. `metric` weighs
the error by the layer's inputs: "gram" makes A B^T the optimum of tr(D H D^T) for this Q (CLoQ, arXiv:2501.18475),
"diagonal" takes the mean square of each input for H. Both need text; the best turn is then chosen by that error.

An adapter multiplies its product by alpha / r. The factors stored here are to be applied as they are: an export divides
each by sqrt(alpha / r). The authors' code and peft do not.

Cost: `iterations` singular value decompositions per layer. When it fails: as compression, untrained, more bits or
smaller groups mostly give more for the bytes of the factors; the docs page has the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, TargetError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid, quantize_codes
from trimtab.tensors.grid_search import range_parameters
from trimtab.tensors.low_rank import FACTOR_DTYPES, LowRank, svd
from trimtab.tensors.metric import Metric
from trimtab.tensors.nested_scales import NestedFormat
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights._groups import GroupMethod
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Loftq"]

Bits = Literal[2, 3, 4, 8]
_CLIP_STD = 2.0


@dataclass(frozen=True, kw_only=True)
class Loftq(GroupMethod, LinearMethod):
    """LoftQ. Options of GroupMethod, and:

    quantizer       "nf", "uniform" (one range for the matrix: group_size is -1) or "grid" (asymmetric integers)
    rank            of the correction, at most the shorter side of every target
    iterations      turns of quantizing and decomposing
    init            "zero": quantize W first; "svd": quantize what SVD_r(W) leaves
    metric          norm of the error: "frobenius"; "diagonal" or "gram", of the layer's output, which need text
    high_blocks     so many blocks, from the first, are quantized with `high_bits` instead of `bits`
    high_bits       see there
    double_quant    quantize the scales of "nf" too: 8 bits each and a float32 for 256 of them
    scale_dtype     stored dtype of other scales
    factor_dtype    stored dtype of the factors
    """

    quantizer: Literal["nf", "uniform", "grid"] = "nf"
    rank: int = 16
    iterations: int = 5
    init: Literal["zero", "svd"] = "zero"
    metric: Literal["frobenius", "diagonal", "gram"] = "frobenius"
    high_blocks: int = 0
    high_bits: Bits = 4
    double_quant: bool = False
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    factor_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def check(self) -> None:
        super().check()
        for name, smallest in (("rank", 0), ("iterations", 1), ("high_blocks", 0)):
            if getattr(self, name) < smallest:
                raise ConfigError(f"Loftq: option {name}={getattr(self, name)} must be at least {smallest}.")
        if self.quantizer == "uniform" and self.group_size != -1:
            raise ConfigError(
                f"Loftq: option group_size={self.group_size} does not apply to quantizer='uniform', which has one "
                "range for the whole matrix. Set group_size=-1, or use quantizer='grid'."
            )
        if self.double_quant and self.quantizer != "nf":
            raise ConfigError(f"Loftq: option double_quant is for quantizer='nf', not '{self.quantizer}'.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram"} if self.metric == "gram" else {"second_moment"} if self.metric == "diagonal" else ())

    def check_linear(self, linear: LinearView) -> None:
        super().check_linear(linear)
        if self.rank > min(linear.out_features, linear.in_features):
            raise TargetError(
                f"{linear.name} (role {linear.role}): rank={self.rank} for a weight of shape "
                f"{[linear.out_features, linear.in_features]}; it can be at most the shorter side."
            )

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        weight, metric, dtype = linear.weight.float(), self._metric(linear, stats), FACTOR_DTYPES[self.factor_dtype]
        bits = self.high_bits if linear.block < self.high_blocks else self.bits
        identity = Metric.identity()
        norm, weighted = identity.weighted_norm(weight) or 1.0, metric.weighted_norm(weight) or 1.0
        residual = weight if self.init == "zero" else weight - svd(weight, self.rank, metric, dtype=dtype).dequantize()
        notes: Notes = {}
        best: tuple[GroupGrid | LevelTable, LowRank] | None = None
        best_error = torch.inf
        for turn in range(1, self.iterations + 1):
            quantized = self.quantize(residual, bits)
            error = weight - quantized.dequantize()
            correction = svd(error, self.rank, metric, dtype=dtype)
            low_rank = correction.dequantize()
            residual = weight - low_rank
            left = error - low_rank
            notes[f"frobenius_error_{turn}"] = identity.weighted_norm(left) / norm
            measured = metric.weighted_norm(left) / weighted
            if metric.kind != "identity":
                notes[f"{self.metric}_error_{turn}"] = measured
            if best is None or measured < best_error:
                best, best_error = (quantized, correction), measured
                notes["chosen_iteration"] = turn
        assert best is not None
        return CompressedTensor(parts=best), notes

    def quantize(self, weight: Tensor, bits: Bits) -> GroupGrid | LevelTable:
        """The paper's q_N of a weight [out, in], as it is stored."""
        if self.quantizer == "nf":
            nested = NestedFormat() if self.double_quant else None
            fmt = TableFormat(bits=bits, group_size=self.group_size, scale_dtype=self.scale_dtype, nested=nested)
            return LevelTable.quantize(weight, fmt)
        grid = GridFormat(bits=bits, group_size=self.group_size, symmetric=False, scale_dtype=self.scale_dtype)
        return GroupGrid.quantize(weight, grid) if self.quantizer == "grid" else _uniform(weight, grid)

    def _metric(self, linear: LinearView, stats: Stats | None) -> Metric:
        name = f"the input of {linear.name}"
        if self.metric == "gram":
            assert stats is not None
            assert stats.gram is not None
            return Metric.gram(stats.gram.to(linear.weight.device), name=name)
        if self.metric == "diagonal":
            assert stats is not None
            assert stats.second_moment is not None
            return Metric.diagonal(stats.second_moment.to(linear.weight.device), name=name)
        return Metric.identity()


def _uniform(weight: Tensor, grid: GridFormat) -> GroupGrid:
    """One range for the whole matrix, mean +- 2 std within its extremes, as a grid with fractional zero points."""
    fmt = replace(grid, zero_dtype="float16")
    mean, spread = weight.mean(), _CLIP_STD * weight.std(correction=0)
    low = torch.maximum(weight.min(), mean - spread).clamp(max=0).reshape(1)
    high = torch.minimum(weight.max(), mean + spread).clamp(min=0).reshape(1)
    scale, zero = range_parameters(low, high, fmt)
    assert zero is not None
    scales, zeros = (value.expand(len(weight), 1).contiguous() for value in (scale, zero))
    return GroupGrid.from_codes(quantize_codes(weight, scales, zeros, fmt), scales, zeros, fmt)
