"""What the methods share that remove neurons: how many, which, and what becomes of the down projection."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.weights._pruning.plan import PlanEntry
from trimtab.weights._pruning.repair import repair_ls
from trimtab.weights._pruning.units import SliceUnits, neurons
from trimtab.weights.base import NarrowLinear, SlicedBlock, SliceMethod, WeightMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView, LinearView, ModelView

NEURON_ROLES = ("gate", "up", "gate_up", "down")
Counted = Literal["units", "parameters", "macs"]


@dataclass(frozen=True, kw_only=True)
class NeuronMethod(SliceMethod):
    """A method that removes neurons of MLPs, the same share from every block.

    sparsity    share that is removed
    counted     of what: "units", the neurons of each MLP; "parameters" of the whole model, embeddings and head
                included; or its "macs" per token
    round_to    widths are rounded up to multiples of this
    repair      "none": the down projection keeps its columns. "least_squares": they become the best for the neurons
                that stay, on calibration text (MoDeGPT's compensation, for any choice of neurons)
    """

    sparsity: float = 0.3
    counted: Counted = "units"
    round_to: int = 1
    repair: Literal["none", "least_squares"] = "none"

    def check(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} must be in (0, 1): the share of neurons that is removed.")
        if self.round_to < 1:
            raise ConfigError(f"round_to={self.round_to} must be at least 1.")

    @property
    def score_needs(self) -> frozenset[Need]:
        """Statistics of the input of `down` that `neuron_scores` reads."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        return self.score_needs | (frozenset() if self.repair == "none" else {"gram"})

    @abstractmethod
    def neuron_scores(self, block: BlockView, stats: Mapping[str, Stats]) -> Tensor:
        """What each neuron of the MLP is worth, float [width]; the largest are kept."""

    def keep_of(self, block: BlockView, scores: Tensor, count: int) -> Tensor:
        """bool [width] with `count` true. The default keeps the largest scores; of equal ones the lower index goes."""
        order = torch.argsort(scores, stable=True)
        keep = torch.ones(len(scores), dtype=torch.bool)
        keep[order[: len(scores) - count]] = False
        return keep

    def targeted(self, view: ModelView) -> tuple[LinearView, ...]:
        """The linears of the MLPs that `targets` names. Raises TargetError where it names a part of an MLP only."""
        chosen = tuple(linear for linear in view.select(self.targets) if linear.role in NEURON_ROLES)
        names = {linear.name for linear in chosen}
        for block in view.blocks:
            own = {linear.name for linear in block.mlp.linears}
            if own & names and own - names:
                raise TargetError(
                    f"a neuron of {block.name} has a part in each of {', '.join(sorted(own))}, and targets leaves out "
                    f"{', '.join(sorted(own - names))}. Name the whole MLP, for instance targets=gate,up,down."
                )
        if not chosen:
            raise TargetError(f"targets={','.join(self.targets)} names no MLP; {self.name()} removes neurons of MLPs.")
        return chosen

    def check_model(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        self._widths(model, targets)

    def prepare(self, planning: Planning) -> WeightMethod:
        if self.counted == "units":
            return self
        share = self._share(planning.model, planning.targets)
        planning.record.metrics["neuron_sparsity"] = share
        return dataclasses.replace(self, sparsity=share, counted="units")

    def slice_block(self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]) -> SlicedBlock:
        units = neurons(block)
        keep = self.keep_of(block, self.neuron_scores(block, stats), self.width(units.count))
        gram = None
        if self.repair == "least_squares":
            gram = stats[next(x.site for x in linears if x.role == "down")].gram
            assert gram is not None
        return SlicedBlock(sliced_neurons(linears, units, keep, gram), plan=(PlanEntry.of(units, keep),))

    def width(self, neurons: int) -> int:
        """How many of so many neurons stay."""
        kept = neurons - int(neurons * self.sparsity)
        return min(neurons, self.round_to * math.ceil(kept / self.round_to))

    def _widths(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        share = self._share(model, targets)
        method = dataclasses.replace(self, sparsity=share, counted="units")
        for linear in targets:
            if linear.role != "down":
                continue
            kept = method.width(linear.in_features)
            if not 0 < kept < linear.in_features:
                what = "no neuron" if kept == 0 else "every neuron"
                raise TargetError(
                    f"{linear.name}: sparsity={self.sparsity} with round_to={self.round_to} leaves {what} of "
                    f"{linear.in_features}. Choose another sparsity or round_to."
                )

    def _share(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> float:
        """The share of each MLP's neurons that `sparsity` comes to. Raises BudgetError where that is all of them."""
        if self.counted == "units":
            return self.sparsity
        from trimtab.models.counting import ledger_of
        from trimtab.models.info import stored_tensors

        inside = sum(x.out_features * x.in_features for x in targets)
        if self.counted == "parameters":
            whole = sum(tensor.numel() for tensor in stored_tensors(model).values())
            inside += sum(x.out_features for x in targets if x.role != "down" and x.bias is not None)
        else:
            whole = ledger_of(model).macs_per_token
        share = self.sparsity * whole / inside
        if share >= 1:
            raise BudgetError(
                f"sparsity={self.sparsity} of the whole model's {self.counted} is {self.sparsity * whole:,.0f}, and "
                f"the MLPs have {inside:,}. The largest possible is {inside / whole:.3f}."
            )
        return share


def sliced_neurons(
    linears: Sequence[LinearView], units: SliceUnits, keep: Tensor, gram: Tensor | None
) -> dict[str, NarrowLinear]:
    """The linears of an MLP with the neurons that `keep` names.

    gram    [width, width] of the input of `down`, to make up for the others by least squares; None: do not
    """
    kept = units.kept_indices(keep)
    made = {}
    for linear in linears:
        weight, bias, index = linear.weight, linear.bias, kept[linear.name].to(linear.weight.device)
        if linear.role != "down":
            made[linear.name] = NarrowLinear(weight[index], None if bias is None else bias[index])
        elif gram is None:
            made[linear.name] = NarrowLinear(weight[:, index], bias)
        else:
            repaired = repair_ls(weight, gram.to(weight.device), keep.to(weight.device))
            made[linear.name] = NarrowLinear(repaired.to(weight.dtype), bias)
    return made
