"""Low-rank part first, then NormalFloat codes of what is left, the quantizer of each matrix chosen within a budget.

Paper: Guo, Greengard, Xing, Kim, "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model
Finetuning", ICLR 2024, arXiv:2311.12023.

Each weight becomes Q + L1 L2, from Q = 0 by turns, until the error rises or `iterations` are done:

    L1 L2 = SVD_r(W - Q)          Q = NF(W - L1 L2)          error = |W - Q - L1 L2|

With `weighting="fisher"` both the error and the SVD are weighted by the Fisher information of the uncompressed model on
the calibration text, F_ij ~ r_i c_j / mean F from its row and column means: SVD of diag(sqrt r) (W - Q) diag(sqrt c),
scaled back. The quantizer is never weighted.

The quantizer has five numbers: bits, block size, and how the scales of the blocks are quantized in turn (see
tensors/nested_scales.py). An integer program chooses them for each matrix, at the least sum of squared (weighted)
errors with at most `budget_bits` bits per weight. The budget is that of the quantized part, as in the paper; the
factors add 16 rank (out + in) / (out in). Kept frozen and trained factors serve as a LoRA adapter.

Departures from the paper: the best turn is returned, not the one after it. Factors are rounded to `factor_dtype` before
the quantizer sees what they leave. Errors are weighted by the factors of F, not F itself, which is as large as the
model in float32; `exact_costs` takes F for the integer program. The program's costs are errors after `cost_iterations`
turns, not all: the first SVD then serves all configurations of a matrix, and later turns change their order little. 24
quantizers by default instead of the 432, `configurations="all"`. Blocks lie within rows, and configurations whose
blocks do not divide a matrix's width are no candidates for it. Trained adapters are not stored in NF8: that is for
after training, which happens elsewhere.

Cost: one backward pass over the text; per matrix a quantization per configuration and an SVD per turn. When it fails:
as compression, untrained, gptq with the bytes of the factors is mostly closer to the original; see the docs page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import FACTOR_DTYPES, LowRank, svd
from trimtab.tensors.metric import Metric
from trimtab.tensors.nested_scales import NestedFormat
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights._allocation import allocate, smallest
from trimtab.weights.base import LinearMethod, Notes, WeightMethod

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["LqLora"]

Bits = Literal[2, 3, 4, 8]
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class LqLora(LinearMethod):
    """LQ-LoRA.

    budget_bits        most bits per weight of the quantized part, on average over all targets
    rank               of the low-rank part, at most the shorter side of every target
    weighting          "fisher", which needs text, or "none"
    iterations         most turns of decomposing and quantizing
    polish             one more SVD for the best Q; never a larger error, up to the rounding of the factors
    widths             bits per code to choose from
    block_sizes        weights that share a scale, to choose from; those that do not divide a matrix's width are no
                       candidates for it
    configurations     how scales are quantized. "few": in 4 or 8 bits, with a float32 maximum for 256 of them. "all":
                       the paper's 36 ways, 432 quantizers with all widths and block sizes
    cost_iterations    turns after which errors are compared for the integer program
    exact_costs        compare by F itself, not by its rows and columns: 4 bytes per weight, for small models
    factor_dtype       stored dtype of the factors
    """

    budget_bits: float = 3.0
    rank: int = 64
    weighting: Literal["fisher", "none"] = "fisher"
    iterations: int = 100
    polish: bool = False
    widths: tuple[int, ...] = WIDTHS
    block_sizes: tuple[int, ...] = (16, 32, 64)
    configurations: Literal["few", "all"] = "few"
    cost_iterations: int = 1
    exact_costs: bool = False
    factor_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def check(self) -> None:
        for name, least in (("rank", 0), ("iterations", 1), ("cost_iterations", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"LqLora: option {name}={getattr(self, name)} must be at least {least}.")
        for name in ("widths", "block_sizes"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"LqLora: option {name}={getattr(self, name)} must hold positive numbers.")
        self.formats()  # each checks itself
        if not 0 < self.budget_bits < math.inf:
            raise ConfigError(f"LqLora: option budget_bits={self.budget_bits} must be a positive number.")
        if self.exact_costs and self.weighting != "fisher":
            raise ConfigError("LqLora: option exact_costs is for weighting='fisher'.")

    @property
    def needs_text(self) -> bool:
        return self.weighting == "fisher"

    def formats(self) -> tuple[TableFormat, ...]:
        """All configurations, (b, b0, b1, B0, B1) in the paper's letters."""
        return _formats(tuple(self.widths), tuple(self.block_sizes), self.configurations == "all")

    def formats_of(self, linear: LinearView) -> list[TableFormat]:
        """Those whose blocks divide the width of `linear`. Raises TargetError if there is none."""
        fitting = [fmt for fmt in self.formats() if linear.in_features % fmt.group_size == 0]
        if not fitting:
            raise TargetError(
                f"{linear.name} (role {linear.role}) is {linear.in_features} wide; blocks of {list(self.block_sizes)} "
                "weights do not divide it. Give other block_sizes, or leave it out with `targets`."
            )
        return fitting

    def check_linear(self, linear: LinearView) -> None:
        self.formats_of(linear)
        if self.rank > min(linear.out_features, linear.in_features):
            raise TargetError(
                f"{linear.name} (role {linear.role}): rank={self.rank} for a weight of shape "
                f"{[linear.out_features, linear.in_features]}; it can be at most the shorter side."
            )

    def check_model(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        weights, budget, sizes = self._bytes(targets)
        if (least := smallest(sizes)) > budget:
            raise BudgetError(
                f"budget_bits={self.budget_bits} is {budget:,} bytes for the {weights:,} weights of the targets; the "
                f"smallest possible is budget_bits={math.ceil(least * 8e4 / weights) / 1e4:g} ({least:,} bytes)."
            )

    def _bytes(self, targets: Sequence[LinearView]) -> tuple[int, int, list[list[int]]]:
        """Weights of all targets, the bytes they may take, and the size of each configuration of each."""
        shapes = [(linear.out_features, linear.in_features) for linear in targets]
        sizes = [
            [_nbytes(shape, fmt) for fmt in self.formats_of(linear)]
            for linear, shape in zip(targets, shapes, strict=True)
        ]
        weights = sum(math.prod(shape) for shape in shapes)
        return weights, int(self.budget_bits * weights / 8), sizes

    def prepare(self, planning: Planning) -> WeightMethod:
        formats = {linear.name: self.formats_of(linear) for linear in planning.targets}
        weights, budget, sizes = self._bytes(planning.targets)
        factors = self._fisher(planning) if self.weighting == "fisher" else {}
        costs = planning.remembered(
            "costs", lambda: [self._costs(x, formats[x.name], factors) for x in planning.targets]
        )
        chosen = allocate(costs, sizes, budget)
        planning.record.metrics["plan"] = {
            "budget_bytes": budget,
            "planned_bytes": chosen.size,
            "bits_per_weight": 8 * chosen.size / weights,
            "sum_of_costs": chosen.cost,
            "gap": chosen.gap,
        }
        picked = {
            linear.name: formats[linear.name][choice]
            for linear, choice in zip(planning.targets, chosen.choices, strict=True)
        }
        metrics = {linear.name: _metric(linear, factors) for linear in planning.targets}
        return _Planned(targets=self.targets, options=self, formats=picked, metrics=metrics)

    def _fisher(self, planning: Planning) -> dict[str, Tensor]:
        """ "NAME:rows" -> [out], "NAME:columns" -> [in] and, with `exact_costs`, "NAME:full" -> [out, in]."""
        from trimtab.models.fisher import fisher_information

        def compute() -> dict[str, Tensor]:
            assert planning.calibration is not None
            found = fisher_information(
                planning.model,
                planning.targets,
                planning.calibration,
                full=self.exact_costs,
                progress=planning.progress,
            )
            named = {f"{name}:rows": fisher.rows for name, fisher in found.items()}
            named |= {f"{name}:columns": fisher.columns for name, fisher in found.items()}
            return named | {f"{name}:full": fisher.full for name, fisher in found.items() if fisher.full is not None}

        with planning.record.timed("fisher"):
            return planning.remembered_tensors("fisher", compute)

    def _costs(self, linear: LinearView, formats: list[TableFormat], factors: Mapping[str, Tensor]) -> list[float]:
        """The squared (weighted) error of each configuration; the first low-rank part is the same for all."""
        weight, metric = linear.weight.float(), _metric(linear, factors)
        dtype, full = FACTOR_DTYPES[self.factor_dtype], factors.get(f"{linear.name}:full")
        first = svd(weight, self.rank, metric, dtype=dtype)
        costs = []
        for fmt in formats:
            found = decompose(weight, metric, fmt, first, iterations=self.cost_iterations)
            left = weight - found.quantized.dequantize() - found.low_rank.dequantize()
            if full is None:
                costs.append(metric.squared_norm(left))
            else:
                costs.append(float((full.to(left.device).double() * left.double().square()).sum()))
        return costs

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        raise ConfigError("LqLora compresses once it is planned: call trimtab.compress, which does both.")


@dataclass(frozen=True, kw_only=True)
class _Planned(LinearMethod):
    """formats    name of a linear -> its configuration;    metrics    name -> Metric;    options    of the method"""

    options: Any
    formats: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def check_linear(self, linear: LinearView) -> None:
        self.options.check_linear(linear)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        options, fmt, metric = self.options, self.formats[linear.name], self.metrics[linear.name]
        weight = linear.weight.float()
        dtype = FACTOR_DTYPES[options.factor_dtype]
        first = svd(weight, options.rank, metric, dtype=dtype)
        found = decompose(weight, metric, fmt, first, iterations=options.iterations)
        low_rank = found.low_rank
        if options.polish:
            low_rank = svd(weight - found.quantized.dequantize(), options.rank, metric, dtype=dtype)
        notes: Notes = {
            "bits": fmt.bits,
            "group_size": fmt.group_size,
            "scale_bits": fmt.nested.bits,
            "scale_block_size": fmt.nested.block_size,
            "scale_dtype": fmt.nested.dtype,
            "turns": len(found.errors),
            "chosen_turn": found.turn,
            "first_error": found.errors[0],
            "error": found.errors[found.turn - 1],
        }
        return CompressedTensor(parts=(found.quantized, low_rank)), notes


@dataclass(frozen=True, slots=True)
class Decomposition:
    """errors: |W - Q - L1 L2| of each turn, in the metric, relative to |W|; the parts are those of `turn` (from 1)."""

    quantized: LevelTable
    low_rank: LowRank
    errors: tuple[float, ...]
    turn: int


def decompose(weight: Tensor, metric: Metric, fmt: TableFormat, first: LowRank, *, iterations: int) -> Decomposition:
    """Turns of low-rank part and quantizer on `weight` float32 [out, in], until the error rises; the best one.

    `first` is SVD_r(W) in the metric, whose rank and dtype the others have.
    """
    scale = metric.weighted_norm(weight) or 1.0
    low_rank, errors = first, []
    best: Decomposition | None = None
    for turn in range(1, iterations + 1):
        if best is not None:
            low_rank = svd(weight - best.quantized.dequantize(), first.rank, metric, dtype=first.left.dtype)
        target = weight - low_rank.dequantize()
        quantized = LevelTable.quantize(target, fmt)
        errors.append(metric.weighted_norm(target - quantized.dequantize()) / scale)
        if best is not None and errors[-1] >= best.errors[-1]:
            return Decomposition(best.quantized, best.low_rank, tuple(errors), best.turn)
        best = Decomposition(quantized, low_rank, tuple(errors), turn)
    assert best is not None
    return best


@functools.cache
def _formats(widths: tuple[int, ...], block_sizes: tuple[int, ...], every: bool) -> tuple[TableFormat, ...]:
    scale_bits: tuple[int, ...] = (4, 8)
    dtypes: tuple[Literal["float32", "float16", "bfloat16"], ...] = ("float32",)
    scale_blocks: tuple[int, ...] = (256,)
    if every:
        scale_bits, dtypes, scale_blocks = WIDTHS, ("bfloat16", "float16", "float32"), (16, 64, 256)
    found = []
    for bits, b0, b1, size, outer in product(widths, scale_bits, dtypes, block_sizes, scale_blocks):
        nested = NestedFormat(bits=cast(Bits, b0), block_size=outer, dtype=b1)
        found.append(TableFormat(bits=cast(Bits, bits), group_size=size, nested=nested))
    return tuple(found)


def _metric(linear: LinearView, factors: Mapping[str, Tensor]) -> Metric:
    """F_ij ~ rows_i columns_j / mean, so that errors of different matrices compare."""
    if not factors:
        return Metric.identity()
    device: torch.device = linear.weight.device
    rows, columns = (factors[f"{linear.name}:{name}"].to(device).double() for name in ("rows", "columns"))
    mean = float(rows.mean())
    return Metric.row_column(rows, columns / mean if mean > 0 else columns, name=f"the Fisher of {linear.name}")


def _nbytes(shape: tuple[int, int], fmt: TableFormat) -> int:
    """What a matrix of this shape takes in this format."""
    return sum(dtype.itemsize * math.prod(size) for size, dtype in LevelTable.buffers(fmt.spec(shape)).values())
