"""What the claims of pruning methods share: one method beside another at the same sparsity, and random removal."""

from __future__ import annotations

import functools

import torch

from trimtab.claims._reference import SEEDS, measured, predictions, reference
from trimtab.claims.base import Outcome
from trimtab.evaluation import divergence
from trimtab.evaluation.outliers import Kind
from trimtab.models.views import ModelView
from trimtab.weights._pruner import SparseMethod
from trimtab.weights._pruning.plan import Plan, PlanEntry
from trimtab.weights._pruning.units import elements

CLOSER = (
    "Holds if at the same sparsity the paired 95 % interval of the difference in KL to {} lies below zero for each of "
    "three seeds of the calibration text"
)


def closer(method: SparseMethod, other: SparseMethod, outliers: Kind | None = None) -> Outcome:
    """Whether `method` is closer to `ref` than `other` by the rule CLOSER; bytes of both beside it."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        own = measured(method, outliers, seed)
        against = measured(other, outliers, seed if outliers or other.needs_text else 0)
        found |= {
            f"kl_nats_per_token_seed_{seed}": own.kl,
            f"kl_difference_high_seed_{seed}": own.divergence.kl_difference(against.divergence).high,
            "bytes_at_rest": own.bytes_at_rest,
        }
        name = type(other).name()
        baseline |= {
            f"{name}_kl_nats_per_token_seed_{seed}": against.kl,
            f"{name}_bytes_at_rest": against.bytes_at_rest,
        }
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in SEEDS))


@functools.cache
def random_kl(share: float, seed: int) -> float:
    """KL to `ref` of `ref` without this share of the entries of each linear, drawn at random."""
    model = reference()
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(seed)
    maps = [elements(linear) for linear in view.linears]
    entries = tuple(PlanEntry.of(units, torch.rand(units.count, generator=generator) >= share) for units in maps)
    with torch.no_grad():
        Plan(entries).zero(view.linears, maps)
    return divergence(model, predictions()).estimates()["kl_nats_per_token"].value
