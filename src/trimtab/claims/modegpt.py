"""Claims of MoDeGPT: compensation, allocation by influence, and what goes beyond the paper."""

from __future__ import annotations

import functools

import torch

from trimtab.claims._reference import SEEDS, SETTING, measured, predictions, reference
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import Divergence, divergence
from trimtab.models.views import BlockView, ModelView
from trimtab.weights import MoDeGpt
from trimtab.weights._pruning.plan import Plan, PlanEntry
from trimtab.weights._pruning.units import SliceUnits, neurons, rotary_pairs, value_directions

__all__ = ["CLAIMS"]


@functools.cache
def random_slices(sparsity: float, seed: int) -> Divergence:
    """`ref` without random neurons, rotary pairs and value directions, the same share of every width and head.

    The units are set to zero, which computes what narrower matrices would."""
    model = reference()
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(seed)
    maps = [units for block in view.blocks for units in _units(block)]
    heads = view.blocks[0].attention.num_kv_heads
    entries = []
    for units in maps:
        rows = 1 if units.kind == "neuron" else heads
        order = torch.rand(rows, units.count // rows, generator=generator).argsort(dim=1)
        keep = order < _kept(units.count // rows, sparsity, units.kind)
        entries.append(PlanEntry.of(units, keep.reshape(-1)))
    with torch.no_grad():
        Plan(tuple(entries)).zero(view.linears, maps)
    return divergence(model, predictions())


def _units(block: BlockView) -> tuple[SliceUnits, ...]:
    return neurons(block), rotary_pairs(block), value_directions(block)


def _kept(width: int, sparsity: float, kind: str) -> int:
    """As MoDeGPT rounds: heads and MLPs to multiples of 8, which is 4 pairs."""
    multiple = 4 if kind == "rotary_pair" else 8
    return min(width, multiple * -(-round((1 - sparsity) * width * 1e6) // (multiple * 10**6)))


def beats_random_slices() -> Outcome:
    """At one share everywhere, so that both have the same parameters to the last one."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for seed in SEEDS:
        made = measured(MoDeGpt(allocation="uniform"), seed=seed)
        bare = measured(MoDeGpt(allocation="uniform", repair="none"), seed=seed)
        drawn = random_slices(MoDeGpt().sparsity, seed)
        gain = made.divergence.kl_difference(bare.divergence).high
        margin = bare.divergence.kl_difference(drawn).high
        found |= {
            f"kl_nats_per_token_seed_{seed}": made.kl,
            f"kl_difference_to_no_compensation_high_seed_{seed}": gain,
            f"no_compensation_to_random_high_seed_{seed}": margin,
            "bytes_at_rest": made.bytes_at_rest,
        }
        baseline |= {
            f"no_compensation_kl_nats_per_token_seed_{seed}": bare.kl,
            f"random_kl_nats_per_token_seed_{seed}": drawn.estimates()["kl_nats_per_token"].value,
            "no_compensation_bytes_at_rest": bare.bytes_at_rest,
        }
        holds &= gain < 0 and margin < 0
    return Outcome(found, baseline, holds)


def _closer(method: MoDeGpt, other: MoDeGpt, name: str) -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        own, against = measured(method, seed=seed), measured(other, seed=seed)
        found |= {
            f"kl_nats_per_token_seed_{seed}": own.kl,
            f"kl_difference_high_seed_{seed}": own.divergence.kl_difference(against.divergence).high,
            f"bytes_at_rest_seed_{seed}": own.bytes_at_rest,
        }
        baseline |= {
            f"{name}_kl_nats_per_token_seed_{seed}": against.kl,
            f"{name}_bytes_at_rest_seed_{seed}": against.bytes_at_rest,
        }
    return Outcome(found, baseline, all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in SEEDS))


def allocation_beats_uniform() -> Outcome:
    return _closer(MoDeGpt(round_to=2), MoDeGpt(round_to=2, allocation="uniform"), "uniform")


def allocation_beats_uniform_at_half() -> Outcome:
    half = MoDeGpt(sparsity=0.5, round_to=2)
    return _closer(half, MoDeGpt(sparsity=0.5, round_to=2, allocation="uniform"), "uniform")


def output_energy_beats_leverage() -> Outcome:
    options = MoDeGpt(parts=("mlp",), allocation="uniform", score="energy_down")
    return _closer(options, MoDeGpt(parts=("mlp",), allocation="uniform"), "ridge")


def joint_values_beat_separate() -> Outcome:
    return _closer(
        MoDeGpt(parts=("vo",), allocation="uniform"),
        MoDeGpt(parts=("vo",), allocation="uniform", joint_values=False),
        "separate",
    )


_PAPER = method_info("modegpt").paper
_RULE = (
    "Holds if the paired 95 % interval of the difference in KL to {} lies below zero for each of three draws of the "
    "calibration text"
)

CLAIMS = (
    Claim(
        "modegpt",
        _PAPER,
        "At equal parameters it beats the same slices without compensation, and these beat random slices.",
        f"ref with 30 % of every width removed, {SETTING}. {_RULE.format('the model without compensation')}, and so "
        "does that of the latter to random neurons, pairs and directions of the same number.",
        beats_random_slices,
    ),
    Claim(
        "modegpt",
        _PAPER,
        "Removing more from blocks of less influence beats the same share everywhere at 30 %.",
        f"ref, temperature 0.1, {SETTING}; bytes differ by what rounding to multiples of 2 makes of each share. "
        f"{_RULE.format('uniform allocation')}.",
        allocation_beats_uniform,
    ),
    Claim(
        "modegpt",
        _PAPER,
        "Removing more from blocks of less influence beats the same share everywhere at 50 %.",
        f"ref, temperature 0.1, {SETTING}; bytes differ by what rounding to multiples of 2 makes of each share. "
        f"{_RULE.format('uniform allocation')}.",
        allocation_beats_uniform_at_half,
    ),
    Claim(
        "modegpt",
        _PAPER,
        "Scoring neurons by what they add to the output beats their ridge leverage (beyond the paper).",
        f"ref with 30 % of the neurons of every MLP removed and both repaired, {SETTING}. "
        f"{_RULE.format('ridge leverage')}.",
        output_energy_beats_leverage,
    ),
    Claim(
        "modegpt",
        _PAPER,
        "With grouped queries, value directions chosen by what reaches the output beat the paper's, chosen by energy.",
        f"ref with 30 % of the value directions of every head removed, {SETTING}. "
        f"{_RULE.format('the paper, which leaves out the second SVD')}.",
        joint_values_beat_separate,
    ),
)
