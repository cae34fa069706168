"""Quantize column by column and push each column's rounding error into the columns still to come.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323.

Minimises `tr((W~ - W) H (W~ - W)^T)` with `H = E[x x^T]`, greedily, all rows at once. With `H^-1 = U^T U`, U upper
triangular, the columns are taken from left to right:

    w~_i = nearest grid point of w_i         (the grid of column i's group)
    e_i  = (w_i - w~_i) / U_ii
    w_j -= e_i U_ij     for all j > i

The sum of all e_i^2 is the objective reached (with the damped H); half of it is reported as `gptq_loss`. Updates go to
the columns of a block of `block_size` at once and to the rest after the block, which changes the speed only.

Departures from the authors' code:
  - The mean that damping is a share of is taken before the diagonal of dead columns (H_jj = 0, an input that is never
    active; their weights become zero) is set to 1, so that the result does not depend on the scale of the activations.
    If all columns are dead the layer is rounded to nearest instead.
  - Groups without `static_groups` take their range from weights that hold *all* earlier corrections. There, a group
    that begins inside a block misses those of its own block.
  - `act_order` implies static groups: the group of column j stays j // group_size and no index is stored.
  - If the Cholesky factorisation fails, damping grows tenfold, up to three times; then the layer is rounded to nearest.
    Both are reported in the run record (`damping`,
    `fallback`).

Cost: O(in^3 + out in^2) per layer and one in x in matrix; U in float64, columns in float32.
When it fails: with calibration text unlike the text in use, or with fewer tokens than a few times the layer's width,
the corrections fit noise. At 8 bits there is nothing left to gain over rtn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid, column_codes, column_values, quantize_codes
from trimtab.tensors.metric import Metric
from trimtab.weights._column_sweep import sweep
from trimtab.weights._grid import GridMethod
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Gptq"]


@dataclass(frozen=True, kw_only=True)
class Gptq(GridMethod, LinearMethod):
    """GPTQ on the grids of GridMethod, with its options and:

    percdamp         added to the diagonal of H, as a share of its mean
    block_size       columns whose corrections are applied at once; changes the speed only
    act_order        take columns by decreasing H_jj, so that the most active inputs are rounded first
    static_groups    ranges of all groups from the original weights, instead of from the corrected ones when a group is
                     reached; act_order implies it
    """

    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False

    def check(self) -> None:
        super().check()
        if not 0 < self.percdamp <= 1:
            raise ConfigError(f"Gptq: option percdamp={self.percdamp} must be above 0 and at most 1.")
        if self.block_size < 1:
            raise ConfigError(f"Gptq: option block_size={self.block_size} must be at least 1.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram"})

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        assert stats is not None
        assert stats.gram is not None
        weight = linear.weight.float()
        grid, notes = self.rounded(weight, stats.gram.to(weight.device), f"the input of {linear.name}")
        return CompressedTensor(parts=(grid,)), notes

    def rounded(self, weight: Tensor, gram: Tensor, name: str) -> tuple[GroupGrid, Notes]:
        """`weight` [out, in] float32 on its grid, for inputs of second moment `gram` [in, in]; errors say `name`."""
        metric = Metric.gram(gram, name=name)
        assert metric.column is not None
        order = metric.column_order() if self.act_order else None
        try:
            inverse = (metric if order is None else metric.permuted(order)).inverse_cholesky(self.percdamp)
        except NumericsError as error:
            return self._nearest(weight, metric.column, str(error))
        if bool(inverse.dead.all()):
            return self._nearest(weight, metric.column, "no input is ever active")
        dead = metric.column == 0
        weight = torch.where(dead, 0.0, weight)  # a copy, which the solver overwrites
        codes, scales, zeros, loss = self._solve(weight, inverse.factor, order, metric.column)
        grid = GroupGrid.from_codes(codes, scales, zeros, self.format)
        return grid, {"damping": inverse.damping, "dead_columns": int(dead.sum()), "gptq_loss": loss}

    def _nearest(self, weight: Tensor, second_moment: Tensor, reason: str) -> tuple[GroupGrid, Notes]:
        """What rtn does, with the reason for falling back to it."""
        scales, zeros = self.parameters(weight, second_moment)
        grid = GroupGrid.from_codes(quantize_codes(weight, scales, zeros, self.format), scales, zeros, self.format)
        return grid, {"fallback": "rtn", "fallback_reason": reason}

    def _solve(
        self, weight: Tensor, upper: Tensor, order: Tensor | None, diagonal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """Codes [out, in], scales, zeros and half the objective, for `weight` [out, in] float32.

        `upper` is U, with rows and columns in the processing `order` (None: left to right).
        """
        fmt = self.format
        out_features, in_features = weight.shape
        length = fmt.group_length((out_features, in_features))
        static = self.static_groups or order is not None
        scales, zeros = self.parameters(weight, diagonal)  # of dynamic groups: replaced when the group is reached
        columns = (weight if order is None else weight[:, order]).T.contiguous()  # [in, out]: a column is a row here
        group_of = torch.arange(in_features) // length if order is None else order.cpu() // length
        groups = group_of.tolist()
        codes = torch.empty_like(columns, dtype=torch.uint8)

        def rounded(i: int) -> Tensor:
            group = groups[i]
            if not static and i % length == 0:
                fresh_scales, fresh_zeros = self.group_parameters(columns[i : i + length].T, diagonal[i : i + length])
                scales[:, group] = fresh_scales
                if zeros is not None and fresh_zeros is not None:
                    zeros[:, group] = fresh_zeros
            scale, zero = scales[:, group], None if zeros is None else zeros[:, group]
            codes[i] = column_codes(columns[i], scale, zero, fmt)
            return column_values(codes[i], scale, zero, fmt)

        loss = sweep(
            columns, upper, lambda start: self._block_end(start, in_features, None if static else length), rounded
        )
        in_place = codes if order is None else torch.empty_like(codes).index_copy_(0, order, codes)
        return in_place.T.contiguous(), scales, zeros, loss

    def _block_end(self, start: int, in_features: int, length: int | None) -> int:
        """Where a block that begins at `start` ends: a dynamic group that would cross the end opens the next block."""
        stop = min(start + self.block_size, in_features)
        if length is None or stop == in_features or stop % length == 0:
            return stop
        last_group = stop - stop % length
        return last_group if last_group > start else stop
