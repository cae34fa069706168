"""What the methods share that leave zeros: how much, which part holds the rest, and the pipeline of scores.

SparseMethod    how much is removed, and the part that a pruned weight becomes
PruneMethod     Score -> Select -> Repair -> Apply for a score that is known before anything is removed
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.model_method import Mode
from trimtab.tensors.bitmap import Bitmap
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.metric import Metric
from trimtab.tensors.sparse import VALUE_DTYPES
from trimtab.tensors.sparse_grid import SparseGrid, check_group_size
from trimtab.weights._pruning.repair import remove_by_sweep, repair_ls_rows
from trimtab.weights._pruning.selection import (
    Sparsity,
    counts_of_all,
    smallest_of_groups,
    smallest_of_matrix,
    smallest_of_rows,
)
from trimtab.weights._pruning.units import n_of_m
from trimtab.weights.base import LinearMethod, Notes, WeightMethod

if TYPE_CHECKING:
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

BLOCK_SIZE = 128
DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class SparseMethod(LinearMethod):
    """A method whose result is a weight with zeros, stored without them.

    sparsity       share that is removed (0.5, "50%"), or n of every m columns of a row ("2:4", "4:8": n are removed)
    value_dtype    stored dtype of what is kept; "weight": that of the weight, so that what is not repaired stays exact
    value_bits     4: what is kept is rounded to a symmetric grid of 4 bits, 3.3 bits per weight at 50 % and groups of
                   64. Where columns are corrected one by one, they are rounded as they go; elsewhere to nearest at the
                   end
    value_group    columns that share a scale with value_bits; a multiple of 64
    """

    sparsity: float | str = 0.5
    value_dtype: Literal["weight", "bfloat16", "float16", "float32"] = "weight"
    value_bits: Literal[4] | None = None
    value_group: int = 64

    def check(self) -> None:
        owner = type(self).__name__
        Sparsity.of(self.sparsity, owner)
        if self.value_bits is None:
            return
        if self.value_dtype != "weight":
            raise ConfigError(
                f"{owner}: options value_bits={self.value_bits} and value_dtype={self.value_dtype!r} exclude each "
                "other; leave one out."
            )
        try:
            check_group_size(self.value_group)
        except ConfigError as error:
            raise ConfigError(f"{owner}: option value_group={self.value_group}: {error}") from None

    @property
    def amount(self) -> Sparsity:
        return Sparsity.of(self.sparsity, type(self).__name__)

    def check_linear(self, linear: LinearView) -> None:
        if (
            self.value_dtype == "weight"
            and self.value_bits is None
            and linear.weight.dtype not in VALUE_DTYPES.values()
        ):
            raise TargetError(
                f"{linear.name} (role {linear.role}): {linear.weight.dtype} values cannot be stored; set value_dtype "
                f"to one of {', '.join(VALUE_DTYPES)}."
            )
        amount = self.amount
        if amount.group is not None:
            n_of_m(linear, *amount.group)
            return
        removed, compared, where = self.removed_of(linear)
        if not 0 < removed < compared:
            what = "nothing" if removed == 0 else "everything"
            raise TargetError(
                f"{linear.name} (role {linear.role}): sparsity={self.sparsity} removes {what} ({removed} of the "
                f"{compared} entries of {where}). Choose another sparsity, or leave this layer out with targets."
            )

    @abstractmethod
    def removed_of(self, linear: LinearView) -> tuple[int, int, str]:
        """How many are removed of how many that are compared with one another, and of what; without n:m."""

    @property
    def rounded_group(self) -> int | None:
        """Columns that share a scale where kept values are rounded; None: they are not."""
        return None if self.value_bits is None else self.value_group

    def stored(
        self, linear: LinearView, weight: Tensor, keep: Tensor, notes: Notes, scales: Tensor | None = None
    ) -> tuple[CompressedTensor, Notes]:
        """The entries of `weight` that `keep` names, as a part, and what is noted of every pruned linear.

        scales   bfloat16 [out, groups] of a weight that is rounded already; None: those of the range of what is kept
        """
        made: Bitmap | SparseGrid
        if self.value_bits is None:
            dtype = linear.weight.dtype if self.value_dtype == "weight" else VALUE_DTYPES[self.value_dtype]
            made = Bitmap.from_dense(weight, keep, dtype)
        else:
            made = SparseGrid.from_dense(weight, keep, self.value_group, scales)
        return CompressedTensor((made,)), {"sparsity": 1 - made.density, **notes}


@dataclass(frozen=True, slots=True)
class Site:
    """What a score sees of one linear.

    weight     float32 [out, in]
    stats      of the linear's input: None exactly if the method needs none
    learned    what `PruneMethod.learn` found out about this linear, or None
    """

    name: str
    weight: Tensor
    stats: Stats | None
    learned: Tensor | None = None

    @property
    def input_norms(self) -> Tensor:
        """The root of the mean square of each input, float32 [in]; for scores whose `score_needs` has second_moment."""
        assert self.stats is not None
        assert self.stats.second_moment is not None
        return self.stats.second_moment.to(self.weight.device).sqrt()


@dataclass(frozen=True, kw_only=True)
class PruneMethod(SparseMethod):
    """A method that scores every entry, removes the smallest and may repair the rest. Options of SparseMethod, and:

    within    what is compared: the entries of a row, of a matrix, or of the whole model ("model"; scores then come from
              the original model). With n:m sparsity it is always the m columns
    repair    what becomes of the kept weights. "none": they stay. "obs": they are corrected column by column, as
              SparseGPT does. "least_squares": the best they can be for this choice, at O(out in^3) for each linear
    """

    own_mode: ClassVar[Mode] = "dense"
    """Without repair, inputs of pruned layers mislead: on `ref` wanda loses 8 % more by them at 50 %, 14 % at 2:4."""

    within: Literal["row", "matrix", "model"] = "row"
    repair: Literal["none", "obs", "least_squares"] = "none"

    @property
    def score_needs(self) -> frozenset[Need]:
        """Statistics that `score` reads."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        return self.score_needs | (frozenset() if self.repair == "none" else {"gram"})

    @abstractmethod
    def score(self, site: Site) -> Tensor:
        """What removing each entry would cost, float32 [out, in], non-negative; smaller is removed first."""

    def learn(self, planning: Planning) -> Mapping[str, Tensor]:
        """Name of a linear -> what has to be known of it before the first block is changed, for `Site.learned`."""
        return {}

    def removed_of(self, linear: LinearView) -> tuple[int, int, str]:
        if self.within == "row":
            return self.amount.row_count(linear.in_features), linear.in_features, "a row"
        entries = linear.out_features * linear.in_features
        return self.amount.matrix_count(entries), entries, "the matrix"

    def prepare(self, planning: Planning) -> WeightMethod:
        learned = self.learn(planning)
        counts: Mapping[str, int] = {}
        if self.within == "model" and self.amount.group is None:
            counts = planning.remembered("counts", lambda: self._counts(planning, learned))
            planning.record.metrics["removed"] = dict(counts)
        if not learned and not counts:
            return self
        return _Prepared(targets=self.targets, method=self, counts=counts, learned=learned)

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        return self.pruned(linear, stats, None, None)

    def pruned(
        self, linear: LinearView, stats: Stats | None, learned: Tensor | None, count: int | None
    ) -> tuple[CompressedTensor, Notes]:
        """`compress`, with what `learn` found out and, for within="model", how many entries this linear loses."""
        weight = linear.weight.float()
        scores = self.score(Site(linear.name, weight, stats, learned))
        keep = ~self.select(scores, count)
        if self.repair == "none":
            return self.stored(linear, linear.weight, keep, {})
        assert stats is not None
        assert stats.gram is not None
        gram = stats.gram.to(weight.device)
        if self.repair == "least_squares":
            return self.stored(linear, repair_ls_rows(weight, gram, keep), keep, {})
        inverse = Metric.gram(gram, name=f"the input of {linear.name}").inverse_cholesky(DAMPING)
        swept = remove_by_sweep(
            weight,
            inverse,
            lambda start, block: ~keep.T[start : start + len(block)],
            choice_size=BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            rounded_group=self.rounded_group,
        )
        return self.stored(linear, swept.weight, swept.keep, {"damping": inverse.damping}, swept.scales)

    def select(self, scores: Tensor, count: int | None) -> Tensor:
        """bool [out, in], true at what is removed."""
        amount = self.amount
        if amount.group is not None:
            return smallest_of_groups(scores, *amount.group)
        if self.within == "row":
            return smallest_of_rows(scores, amount.row_count(scores.shape[1]))
        return smallest_of_matrix(scores, amount.matrix_count(scores.numel()) if count is None else count)

    def _counts(self, planning: Planning, learned: Mapping[str, Tensor]) -> dict[str, int]:
        """How many entries each target loses to one threshold over all of them."""
        stats = self._dense_stats(planning)

        def scores() -> Iterator[tuple[str, Tensor]]:
            for linear in planning.targets:
                found = stats.get(linear.site)
                yield linear.name, self.score(Site(linear.name, linear.weight.float(), found, learned.get(linear.name)))

        return counts_of_all(scores, self.amount.matrix_count(_entries(planning.targets)))

    def _dense_stats(self, planning: Planning) -> dict[str, Stats]:
        """What `score` reads of every site, of the original model."""
        if not self.score_needs:
            return {}
        from trimtab.models.calibration import gather_dense
        from trimtab.models.views import ModelView

        assert planning.calibration is not None
        needs = {linear.site: self.score_needs for linear in planning.targets}
        found: dict[str, Stats] = {}
        with torch.no_grad():
            for block in gather_dense(ModelView.of(planning.model), planning.calibration, needs, seed=planning.seed):
                found |= block
        return found


@dataclass(frozen=True, kw_only=True)
class _Prepared(LinearMethod):
    """A PruneMethod that knows the model: counts (name -> entries removed; empty unless within="model") and learned."""

    method: Any
    counts: Mapping[str, int]
    learned: Mapping[str, Any]

    def check_linear(self, linear: LinearView) -> None:
        self.method.check_linear(linear)

    @property
    def needs(self) -> frozenset[Need]:
        needs: frozenset[Need] = self.method.needs
        return needs

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        learned, count = self.learned.get(linear.name), self.counts.get(linear.name)
        pruned: tuple[CompressedTensor, Notes] = self.method.pruned(linear, stats, learned, count)
        return pruned


def _entries(linears: Sequence[LinearView]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears)
