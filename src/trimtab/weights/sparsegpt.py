"""Remove weights column by column and correct the columns still to come for what was removed.

Paper: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv:2301.00774.

With `H = E[x x^T]` and `H^-1 = U^T U`, U upper triangular, removing entry (i, j) and correcting the later columns costs
`w_ij^2 / U_jj^2`. Before every block of `block_size` columns, everything in it up to and with the entry of rank
floor(entries * sparsity) is chosen by that cost, all rows together, from weights that hold all earlier corrections; so
every block loses the same share, and rows lose different ones. With n:m sparsity every row chooses n of its next m
columns. Then the columns of the block go one by one as in `gptq`, with a zero in place of a rounded value; with
`value_bits` what is kept is rounded in the same pass, as the paper's section on joint sparsification and quantization
has it, except that its groups have scales of their own.

Departures from the authors' code, as in `gptq`: damping is a share of the mean diagonal without dead columns; if the
factorisation fails, damping grows tenfold, up to three times, and then the layer is pruned as `wanda` does without
correction (`fallback` in the run record). Of equal costs at the threshold only as many go as the count asks for.

Cost: O(in^3 + out in^2) per layer and one in x in matrix. When it fails: with little calibration text, or unlike the
text in use, the corrections fit noise; `wanda` then is as good and much faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.metric import Metric
from trimtab.weights._pruner import BLOCK_SIZE, DAMPING, SparseMethod
from trimtab.weights._pruning.repair import remove_by_sweep
from trimtab.weights._pruning.selection import smallest_of_groups, smallest_of_matrix, smallest_of_rows
from trimtab.weights.base import Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Sparsegpt"]


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(SparseMethod):
    """Options of SparseMethod, and:

    percdamp      added to the diagonal of H, as a share of its mean
    block_size    columns that are chosen from at once, and corrected at once; a multiple of m with n:m sparsity
    """

    percdamp: float = DAMPING
    block_size: int = BLOCK_SIZE

    def check(self) -> None:
        super().check()
        if not 0 < self.percdamp <= 1:
            raise ConfigError(f"Sparsegpt: option percdamp={self.percdamp} must be above 0 and at most 1.")
        if self.block_size < 1:
            raise ConfigError(f"Sparsegpt: option block_size={self.block_size} must be at least 1.")
        group = self.amount.group
        if group is not None and self.block_size % group[1]:
            raise ConfigError(
                f"Sparsegpt: option block_size={self.block_size} must be a multiple of {group[1]} for sparsity "
                f"'{self.sparsity}'."
            )
        rounded = self.rounded_group
        if rounded is not None and self.block_size % rounded and rounded % self.block_size:
            raise ConfigError(
                f"Sparsegpt: option value_group={rounded} must divide block_size={self.block_size}, or be a "
                "multiple of it."
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram"})

    def removed_of(self, linear: LinearView) -> tuple[int, int, str]:
        columns = linear.in_features % self.block_size or min(self.block_size, linear.in_features)
        entries = linear.out_features * columns
        return self.amount.matrix_count(entries), entries, f"the last block of {columns} columns"

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        assert stats is not None
        assert stats.gram is not None
        weight = linear.weight.float()
        metric = Metric.gram(stats.gram.to(weight.device), name=f"the input of {linear.name}")
        assert metric.column is not None
        try:
            inverse = metric.inverse_cholesky(self.percdamp)
        except NumericsError as error:
            return self._uncorrected(linear, metric.column, str(error))
        if bool(inverse.dead.all()):
            return self._uncorrected(linear, torch.ones_like(metric.column), "no input is ever active")
        group = self.amount.group
        swept = remove_by_sweep(
            weight,
            inverse,
            self._choose,
            choice_size=self.block_size if group is None else group[1],
            block_size=self.block_size,
            rounded_group=self.rounded_group,
        )
        notes: Notes = {
            "damping": inverse.damping,
            "dead_columns": int(inverse.dead.sum()),
            "sparsegpt_loss": swept.loss,
        }
        return self.stored(linear, swept.weight, swept.keep, notes, swept.scales)

    def _choose(self, start: int, costs: Tensor) -> Tensor:
        """What is removed of a block, bool like `costs` [columns, out]."""
        amount = self.amount
        if amount.group is not None:
            return smallest_of_groups(costs.T, *amount.group).T
        return smallest_of_matrix(costs.T, amount.matrix_count(costs.numel())).T

    def _uncorrected(self, linear: LinearView, second_moment: Tensor, reason: str) -> tuple[CompressedTensor, Notes]:
        """What wanda does, with the reason for falling back to it."""
        scores, amount = linear.weight.float().abs() * second_moment.sqrt(), self.amount
        if amount.group is not None:
            removed = smallest_of_groups(scores, *amount.group)
        else:
            removed = smallest_of_rows(scores, amount.row_count(scores.shape[1]))
        return self.stored(linear, linear.weight, ~removed, {"fallback": "wanda", "fallback_reason": reason})
