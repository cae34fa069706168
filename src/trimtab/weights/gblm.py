"""Remove weights by magnitude times the sum of their input's norm and of their gradient's.

Paper: Das, Sun, Ma, Shen, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023,
arXiv:2311.04902.

    score_ij = |W_ij| (|X_j|_2 + g_ij)        g_ij = sum_s |alpha dL_s/dW_ij|     (norm="l1")
                                              g_ij = sqrt(sum_s (alpha dL_s/dW_ij)^2)     (norm="l2")

|X_j|_2 is the root of the sum of squares over all tokens, divided by the number of sequences. L_s is the mean loss of
the next token in sequence s, of the original model; every sequence counts by itself. Rows lose what `wanda` makes them
lose: floor(in * sparsity) each, or n of every m columns. With alpha = 0, this is wanda.

The two terms grow differently with the calibration text. `alpha` is meant for the paper's 128 sequences; with N of them
it is multiplied by 128 / N (l1) or sqrt(128 / N) (l2). The run record has the ratio of their medians for each layer
(`gradient_to_norm`). The gain over wanda that the paper reports is small (0.06 to 0.1 in perplexity at 50 %).

Departures: norms come from the original model, as in `wanda`. Gradients are summed in float32 (the code: float16, which
can overflow) and then kept in bfloat16.

Cost: a backward pass for each sequence, as often as it takes to hold the float32 sums in `gradient_memory`; the norms
themselves take 2 bytes per weight until the end. When it fails: as `wanda`; and with few sequences g is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.weights._budget import Budget
from trimtab.weights._pruner import PruneMethod, Site
from trimtab.weights.base import Notes

if TYPE_CHECKING:
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Gblm"]

PAPER_SEQUENCES = 128
_ORDERS: dict[str, Literal[1, 2]] = {"l1": 1, "l2": 2}


@dataclass(frozen=True, kw_only=True)
class Gblm(PruneMethod):
    """Options of PruneMethod, and:

    alpha              weight of the gradient, for 128 sequences; 0 is wanda, and computes no gradient
    norm               over sequences, of each entry's gradient: "l1" or "l2"
    gradient_memory    size of the sums that are held at once, such as "4GB"; less means more passes over the text
    """

    alpha: float = 100.0
    norm: Literal["l1", "l2"] = "l1"
    gradient_memory: str = "4GB"

    def check(self) -> None:
        super().check()
        if not 0 <= self.alpha < float("inf"):
            raise ConfigError(f"Gblm: option alpha={self.alpha} must be zero or positive.")
        if Budget.of(self.gradient_memory).nbytes is None:
            raise ConfigError(f"Gblm: option gradient_memory={self.gradient_memory!r} must be a size, such as 4GB.")

    @property
    def score_needs(self) -> frozenset[Need]:
        return frozenset({"second_moment"})

    def learn(self, planning: Planning) -> Mapping[str, Tensor]:
        """g_ij / sqrt(tokens per sequence), by which `score` may take the root of the mean square for |X_j|_2."""
        if self.alpha == 0:
            return {}
        from trimtab.models.gradient_norms import gradient_norms

        assert planning.calibration is not None
        calibration, order = planning.calibration, _ORDERS[self.norm]
        sequences = len(calibration.tokens)
        alpha = self.alpha * (PAPER_SEQUENCES / sequences) ** (1 / order)
        with planning.record.timed("gradients"):
            return planning.remembered_tensors(
                "gradients",
                lambda: gradient_norms(
                    planning.model,
                    planning.targets,
                    calibration,
                    order=order,
                    scale=alpha / (calibration.count / sequences) ** 0.5,
                    memory=Budget.of(self.gradient_memory).nbytes,
                    progress=planning.progress,
                ),
            )

    def score(self, site: Site) -> Tensor:
        if site.learned is None:
            return site.weight.abs() * site.input_norms
        return site.weight.abs() * (site.input_norms + site.learned.to(site.weight.device).float())

    def pruned(
        self, linear: LinearView, stats: Stats | None, learned: Tensor | None, count: int | None
    ) -> tuple[CompressedTensor, Notes]:
        tensor, notes = super().pruned(linear, stats, learned, count)
        if learned is not None:
            typical = Site(linear.name, linear.weight, stats).input_norms.median()
            ratio = (
                learned.float().median().to(typical.device) / typical if float(typical) > 0 else torch.tensor(torch.inf)
            )
            notes["gradient_to_norm"] = float(ratio)
        return tensor, notes
