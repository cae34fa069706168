"""Per token, multiply by the columns of large inputs only, and by a low-rank copy of the weight for the rest.

Paper: Zhang, Liu, Tian, Khaitan, Wang, Li, "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference",
ICLR 2025, arXiv:2504.19449.

For a linear W [out, in], sparsity s and sparse ratio alpha:

    c_j = |W_:,j|                             norms of the columns
    n_c = max(int(in (1 - s) alpha), 1)       inputs that count for a token, on average
    r = max(int((in out (1 - s) - n_c out) / (in + out)), 1)
                                              rank that the rest of the budget pays for; 0 at alpha = 1
    tau = the int(N q)-th smallest of N values |x_j| c_j, q = 1 - (1 - s) alpha, over calibration tokens and inputs
    y = W (m * x) + L R ((1 - m) * x),  m_j = 1 where |x_j| c_j > tau,  L R = SVD of W cut at r

So at every alpha the numbers that a token reads are about (1 - s) in out. alpha = 1 with criterion "magnitude" is TEAL
(Liu et al. 2024, arXiv:2408.14690): thresholds alone. alpha = "searched" finds one ratio for each linear by evolution
over the loss on calibration sequences: see `_rsparse_search.py`.

Departures. The paper reads prompts densely and its code keeps the first 90 % of the tokens it evaluates dense; here
every token is sparse unless `prefill` says otherwise, and evaluations are sparse always. The criterion is the weighted
one at alpha = 1 too, where their code compares |x_j|. Thresholds come from a uniform sample of 512 calibration tokens,
of inputs that the sparse layers in front produce; mode "dense" takes those of the original model, as the paper does.
The rank uses the real widths of k and v, which their code takes for square. The search is our reconstruction.

It takes more memory than the model did, by the factors: what falls is what a decoded token reads. Batches of more than
8 tokens gain nothing, because the columns that any of them wants are soon all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, TargetError
from trimtab.layers.base import LayerMethod, Notes, Replacement
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.sparse import VALUE_DTYPES
from trimtab.tensors.sparse_inputs import Prefill, SparseInputs, column_norms

if TYPE_CHECKING:
    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView, LinearView

__all__ = ["RSparse"]

ALL = -1.0
"""A threshold below which no input lies: every one counts."""


@dataclass(frozen=True, kw_only=True)
class RSparse(LayerMethod):
    """Options:

    sparsity          share of each weight that a token does not read
    alpha             share of the budget that goes to columns, the rest to the low-rank copy; "searched": one for each
                      linear, found on calibration text
    criterion         what is compared with the threshold: "weighted", |x_j| times the norm of its column; "magnitude",
                      |x_j|
    prefill           what calls with more than 8 tokens compute: "sparse", what single tokens do; "dense", W x, so that
                      prompts are read exactly (and batches of more than 8)
    factor_dtype      stored dtype of the low-rank copy; "weight": that of the weight
    population        vectors of ratios in each generation of the search
    generations       that follow the first one
    survivors         vectors that live on in the next generation, and are the parents of its others
    search_sequences  calibration sequences whose loss is compared
    """

    sparsity: float = 0.5
    alpha: float | Literal["searched"] = 0.95
    criterion: Literal["weighted", "magnitude"] = "weighted"
    prefill: Prefill = "sparse"
    factor_dtype: Literal["weight", "bfloat16", "float16", "float32"] = "weight"
    population: int = 32
    generations: int = 5
    survivors: int = 8
    search_sequences: int = 16

    def check(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"RSparse: option sparsity={self.sparsity} must be above 0 and below 1.")
        if self.alpha != "searched" and not 0 < self.alpha <= 1:
            raise ConfigError(f"RSparse: option alpha={self.alpha} must be above 0 and at most 1, or 'searched'.")
        if not 2 <= self.survivors < self.population:
            raise ConfigError(
                f"RSparse: option survivors={self.survivors} must be at least 2 and below population={self.population}."
            )
        for option in ("generations", "search_sequences"):
            if getattr(self, option) < 1:
                raise ConfigError(f"RSparse: option {option}={getattr(self, option)} must be at least 1.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reservoir"})

    def check_linear(self, linear: LinearView) -> None:
        if self.factor_dtype == "weight" and linear.weight.dtype not in VALUE_DTYPES.values():
            raise TargetError(
                f"{linear.name} holds {linear.weight.dtype}, in which no factors are stored. Load the model in one of "
                f"{', '.join(VALUE_DTYPES)}, or leave this layer out with targets."
            )
        if int(linear.in_features * (1 - self.sparsity)) < 1:
            raise TargetError(
                f"{linear.name} has {linear.in_features} inputs, of which sparsity={self.sparsity} keeps none. Choose "
                "a smaller sparsity, or leave this layer out with targets."
            )

    def prepare(self, planning: Planning) -> LayerMethod:
        if self.alpha != "searched":
            return self
        from trimtab.layers._rsparse_search import search

        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Searched(**own, alphas=search(self, planning))

    def replace(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]
    ) -> Mapping[str, Replacement]:
        return {linear.name: self._replacement(linear, stats[linear.site]) for linear in linears}

    def alpha_of(self, name: str) -> float:
        """The sparse ratio of a linear."""
        assert self.alpha != "searched", "prepare finds the ratios"
        return self.alpha

    def share(self, alpha: float) -> float:
        """The share of inputs that count for a token."""
        return (1 - self.sparsity) * alpha

    def budget(self, out_features: int, in_features: int, alpha: float) -> tuple[int, int]:
        """Inputs that count for a token, and the rank of the low-rank copy."""
        kept = max(int(in_features * self.share(alpha)), 1)
        if alpha == 1:
            return kept, 0
        left = in_features * out_features * (1 - self.sparsity) - kept * out_features
        rank = max(int(left / (in_features + out_features)), 1)
        return kept, min(rank, in_features, out_features)

    def scores(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """What is compared with the threshold, for inputs [tokens, in] in float32: as the kernels compute it."""
        return inputs.abs() * column_norms(weight) if self.criterion == "weighted" else inputs.abs()

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """Of the factors of a weight."""
        return weight.dtype if self.factor_dtype == "weight" else VALUE_DTYPES[self.factor_dtype]

    def part(
        self, weight: Tensor, alpha: float, threshold: float, factors: tuple[Tensor, Tensor] | None = None
    ) -> SparseInputs:
        """What a weight [out, in] becomes. `factors`: of its rank or more, cut to it; None: they are computed."""
        out_features, in_features = weight.shape
        kept, rank = self.budget(out_features, in_features, alpha)
        if factors is not None:
            factors = factors[0][:, :rank], factors[1][:rank]
        return SparseInputs.of(
            weight,
            threshold,
            kept,
            rank=rank,
            weighted=self.criterion == "weighted",
            prefill=self.prefill,
            factor_dtype=self.dtype_of(weight),
            factors=factors,
        )

    def _replacement(self, linear: LinearView, stats: Stats) -> Replacement:
        assert stats.reservoir is not None
        weight, alpha = linear.weight, self.alpha_of(linear.name)
        inputs = stats.reservoir.to(weight.device)
        scores = self.scores(weight, inputs)
        part = self.part(weight, alpha, order_statistic(scores.flatten().sort().values, 1 - self.share(alpha)))
        exact = inputs @ weight.float().t()
        error = (part.matmul(inputs) - exact).square().sum() / exact.square().sum().clamp_min(1e-30)
        notes: Notes = {
            "alpha": alpha,
            "kept_inputs": part.kept,
            "rank": part.rank,
            "threshold": part.limit,
            "kept_share": float((scores > part.limit).float().mean()),
            "relative_error": float(error),
        }
        bias: Any = linear.module.bias
        return Replacement(CompressedLinear(CompressedTensor((part,)), bias), notes)


@dataclass(frozen=True, kw_only=True)
class _Searched(RSparse):
    """RSparse with a ratio for each linear, by name."""

    alphas: Mapping[str, float]

    def alpha_of(self, name: str) -> float:
        return self.alphas[name]


def order_statistic(ascending: Tensor, share: float) -> float:
    """The int(N share)-th smallest of N sorted values, above which a share 1 - `share` lies; ALL if that is none."""
    place = int(len(ascending) * share)
    return float(ascending[place - 1]) if place else ALL
