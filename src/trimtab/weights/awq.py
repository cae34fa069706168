"""Scale the input channels that matter up before rounding, and fold the inverse into what produces them.

Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", MLSys 2024, arXiv:2306.00978.

`W~ = Q(W diag(s)) diag(1/s)`: the rounding error of a column shrinks by its s, while the step of its group hardly
grows. The division by s costs nothing: it goes into the norm in front (q, k, v; gate, up), into the rows of v (o, if
every query head has a value head of its own) or of up (down, in gated MLPs). What is stored is an ordinary grid.

    x_j = E|x_j|                                          w_j = mean over rows of |W_oj| / max of its group
    plain    s = max(x^a, 1e-4)                           duo    s = x^a / (w^(1-a) + 1e-4)
    s /= sqrt(max(s) min(s))

for a = i/20, i = 0 .. 19, and s = 1; "plain" is the paper's form, "duo" a later one of others. The s is kept with which
the attention or the MLP as a whole puts out the least squared error on calibration text when all linears of the site
are rounded; for o and down that is the layer's own output. Then every group's range is clipped: to p max|w| with p from
1 to 0.525 in steps of 0.025, the p of each group and row for which the group's share of the output has the least
squared error on 512 sampled tokens. Not for q and k, whose errors meet in a product.

Departures:
  - The duo form at a = 0 is 1/w, not 1, so s = 1 is tried besides: on the text of the search it is never worse than
    rounding.
  - A site whose producer is shared with a layer that is not a target, or cannot be scaled, is only clipped and rounded;
    the run record says why (`scaling`). Up and down without a gate are among them, although ReLU would allow it.
  - The search runs on the first `search_sequences` calibration sequences; for o and down on all of them.

Cost: one pass for the statistics and, per block, 21 runs of its attention and of its MLP on the search text.
When it fails: at 3 bits and fewer gptq is closer, for it moves errors instead of avoiding them; at 8 bits nothing is
left to gain; with calibration text unlike the text in use the wrong channels are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import ConfigError
from trimtab.models.folding import Fold, RowFold, fold_of
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid, quantize_codes
from trimtab.tensors.grid_format import matrix_shape
from trimtab.tensors.metric import Metric
from trimtab.weights._grid import GridMethod
from trimtab.weights.base import BlockMethod, Compressed, CompressedBlock, Notes

if TYPE_CHECKING:
    from trimtab.models.captured_call import CapturedCall
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView, LinearView
    from trimtab.weights._block_run import BlockRun

__all__ = ["Awq"]

RATIOS = 20
SHRINK_STEPS, MAX_SHRINK = 20, 0.5


@dataclass(frozen=True, slots=True)
class Scaling:
    """The s [in] of one site, float32, as the producer could store it, and what was found about it."""

    scale: Tensor
    notes: Notes
    fold: Fold | None = None


@dataclass(frozen=True, kw_only=True)
class Awq(GridMethod, BlockMethod):
    """AWQ on the grids of GridMethod, with its options (`clip` is applied within the clipped range) and:

    scaling             the form of s: "plain" or "duo"; "none" leaves all channels as they are
    shrink              clip the range of each group to the least error of its share of the output
    search_sequences    calibration sequences on which attention and MLP are run in the search of s, at least; whole
                        chunks of 4096 tokens are run
    """

    scaling: Literal["plain", "duo", "none"] = "plain"
    shrink: bool = True
    search_sequences: int = 16

    def check(self) -> None:
        super().check()
        if self.search_sequences < 1:
            raise ConfigError(f"Awq: option search_sequences={self.search_sequences} must be at least 1.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"mean_abs", "gram", "reservoir"})

    def compress_block(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats], run: BlockRun
    ) -> CompressedBlock:
        names = {linear.name for linear in linears}
        scalings = {site: self._scaling(block, site, names, stats[site], run) for site in stats}
        dense: dict[str, Tensor] = {}
        for scaling in scalings.values():
            if isinstance(scaling.fold, RowFold):  # the weight of that linear is compressed below
                dense |= scaling.fold.divided_bias(scaling.scale)
            elif scaling.fold is not None:
                dense |= scaling.fold.divided(scaling.scale)
        done = {linear.name: self._compress(linear, scalings, stats[linear.site]) for linear in linears}
        return CompressedBlock(done, dense)

    def _compress(self, linear: LinearView, scalings: Mapping[str, Scaling], stats: Stats) -> Compressed:
        """Clip and round W diag(s), with the rows divided whose channels are scaled elsewhere."""
        assert stats.gram is not None
        assert stats.reservoir is not None
        rows = torch.ones(linear.out_features, device=linear.weight.device)
        for other in scalings.values():
            if isinstance(other.fold, RowFold) and other.fold.linear.name == linear.name:
                rows = other.fold.rescaled(rows[:, None], other.scale)[:, 0]
        own = scalings[linear.site]
        weight = linear.weight.float()
        scaled = weight * own.scale * rows[:, None]
        second_moment = stats.gram.diagonal() / own.scale.square()
        if self.shrink:
            length = self.format.group_length(matrix_shape(weight))
            limits = clip_limits(
                scaled, stats.reservoir / own.scale, length, lambda w: self._grid(w, second_moment).dequantize()
            )
            limits[~_clipped_rows(linear)] = torch.inf
            scaled = _clipped(scaled, limits)
        grid = self._grid(scaled, second_moment)
        result = grid.dequantize() / own.scale / rows[:, None]
        errors: Notes = {
            "relative_weight_error": Metric.identity().relative_error(weight, result),
            "relative_error": Metric.gram(stats.gram, name=stats.site).relative_error(weight, result),
        }
        return Compressed(CompressedTensor((grid,)), {**own.notes, **errors})

    def _grid(self, weight: Tensor, second_moment: Tensor) -> GroupGrid:
        scales, zeros = self.parameters(weight, second_moment)
        return GroupGrid.from_codes(quantize_codes(weight, scales, zeros, self.format), scales, zeros, self.format)

    def _scaling(self, block: BlockView, site: str, names: set[str], stats: Stats, run: BlockRun) -> Scaling:
        assert stats.mean_abs is not None
        one = torch.ones_like(stats.mean_abs)
        if self.scaling == "none":
            return Scaling(one, {})
        fold = fold_of(run.view, block, site, names)
        if isinstance(fold, str):
            return Scaling(one, {"scaling": f"none: {fold}"})
        weights = [linear.weight.float() for linear in fold.consumers]
        candidates = self._candidates(stats.mean_abs, weights)
        loss = self._loss(block, fold, weights, stats, run)
        second_moment = one if stats.gram is None else stats.gram.diagonal()
        best, ratio, least, plain = one, "1", float("inf"), 0.0
        for name, scale in candidates.items():
            grids = [self._grid(weight * scale, second_moment / scale.square()) for weight in weights]
            found = loss([grid.dequantize() / scale for grid in grids])
            plain = found if name == "1" else plain
            if found < least:
                best, ratio, least = scale, name, found
        stored = fold.stored(best)
        return Scaling(stored, {"scaling": ratio, "search_error": least, "search_error_unscaled": plain}, fold)

    def _candidates(self, mean_abs: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name -> s, the first of which is "1"."""
        stacked = torch.cat(list(weights))
        size = relative_size(stacked, self.format.group_length(matrix_shape(stacked)))
        found = {"1": torch.ones_like(mean_abs)}
        for step in range(RATIOS):
            ratio = step / RATIOS
            if self.scaling == "duo":
                scale = (mean_abs**ratio / (size ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
            else:
                scale = (mean_abs**ratio).clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            found[f"{ratio:.2f}"] = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
        return found

    def _loss(
        self, block: BlockView, fold: Fold, weights: Sequence[Tensor], stats: Stats, run: BlockRun
    ) -> Callable[[Sequence[Tensor]], float]:
        """Weights of the consumers -> squared error of what they lead to, relative to its size."""
        if isinstance(fold, RowFold):
            assert stats.gram is not None
            metric = Metric.gram(stats.gram, name=stats.site)
            (weight,) = weights
            return lambda found: metric.relative_error(weight, found[0])
        modules = {
            id(part.module): part.module
            for part in (block.attention, block.mlp)
            for linear in fold.consumers
            if linear in part.linears
        }
        calls = [call for module in modules.values() for call in run.capture(module, sequences=self.search_sequences)]

        def output_error(found: Sequence[Tensor]) -> float:
            with _weights(fold.consumers, found):
                return relative_output_error(calls)

        return output_error


def relative_size(weight: Tensor, length: int) -> Tensor:
    """How large the weights of each column are beside the largest of their group, mean over rows: [in]."""
    grouped = weight.abs().reshape(len(weight), -1, length)
    largest = grouped.amax(dim=2, keepdim=True)
    return (grouped / torch.where(largest == 0, 1.0, largest)).reshape(weight.shape).mean(dim=0)


def clip_limits(weight: Tensor, x: Tensor, length: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The clipped range [out, groups] of each group of `weight` [out, in].

    Minimises, for each row and group on its own, E[(sum_(j in group) x_j (w~_j - w_j))^2] over the tokens x
    [tokens, in], with w~ the rounded weight of the clipped group.
    """
    samples = x.reshape(len(x), -1, length).transpose(0, 1)
    gram = samples.transpose(1, 2) @ samples / len(x)  # [groups, length, length]
    largest = weight.abs().reshape(len(weight), -1, length).amax(dim=2)
    best, least = largest, torch.full_like(largest, torch.inf)
    for step in range(SHRINK_STEPS):
        limits = largest * (1 - MAX_SHRINK * step / SHRINK_STEPS)
        error = (rounded(_clipped(weight, limits)) - weight).reshape(len(weight), -1, length).transpose(0, 1)
        total = ((error @ gram) * error).sum(dim=2).T  # [out, groups]
        better = total < least
        best, least = torch.where(better, limits, best), torch.where(better, total, least)
    return best


def relative_output_error(calls: Sequence[CapturedCall]) -> float:
    """|now - then|^2 / |then|^2 of the modules' outputs, padding left out."""
    error = size = 0.0
    with torch.no_grad():
        for call in calls:
            then, now = call.output[call.mask].double(), call.run()[call.mask].double()
            error += float((now - then).square().sum())
            size += float(then.square().sum())
    return error / size if size else error


def _clipped(weight: Tensor, limits: Tensor) -> Tensor:
    grouped = weight.reshape(*limits.shape, -1)
    return grouped.clamp(-limits[:, :, None], limits[:, :, None]).reshape(weight.shape)


def _clipped_rows(linear: LinearView) -> Tensor:
    """bool [out]: the rows whose range may be clipped, all but those of q and k."""
    allowed = torch.full((linear.out_features,), linear.role not in ("q", "k"), device=linear.weight.device)
    for role in ("q", "k"):
        if role in linear.rows:
            allowed[linear.rows[role]] = False
    return allowed


@contextmanager
def _weights(linears: Sequence[LinearView], values: Sequence[Tensor]) -> Iterator[None]:
    """Within: the linears have these weights [out, in], in the dtype of their parameters."""
    parameters = [linear.module.weight for linear in linears]
    kept = [parameter.data for parameter in parameters if isinstance(parameter, nn.Parameter)]
    try:
        for linear, parameter, value in zip(linears, parameters, values, strict=True):
            assert isinstance(parameter, nn.Parameter)
            parameter.data = (value.t() if linear.transposed else value).to(parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            assert isinstance(parameter, nn.Parameter)
            parameter.data = data
