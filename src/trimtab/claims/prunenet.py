"""Claims of PruneNet: what its policy learns of the spectrum, and whether that is worth anything."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.claims._reference import MEASURED, SEEDS, measured, reference
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.models.compression import compress
from trimtab.models.views import ModelView
from trimtab.weights import Neurons, PruneNet
from trimtab.weights._pruning.plan import Plan
from trimtab.weights._pruning.policy import first_matrix, ks_distance, singular_values

__all__ = ["CLAIMS"]

DRAWS = 100
LONGER = {"update": "on_policy", "episodes": 200, "learning_rate": 1e-4, "action": "top_k"}


def _gates(model: PreTrainedModel) -> list[Tensor]:
    return [first_matrix(block.mlp.linears) for block in ModelView.of(model).blocks]


def _mean_ks(keeps: list[Tensor]) -> float:
    """Of the rows of every gate of `ref` that are kept (indices or bool)."""
    gates = _gates(reference())
    pairs = zip(_spectra(), gates, keeps, strict=True)
    return sum(ks_distance(whole, singular_values(gate[keep])) for whole, gate, keep in pairs) / len(gates)


@functools.cache
def _spectra() -> list[Tensor]:
    return [singular_values(gate) for gate in _gates(reference())]


@functools.cache
def _chance(kept: int) -> Tensor:
    """Mean KS of random rows, [DRAWS]."""
    generator = torch.Generator().manual_seed(0)
    widths = [len(gate) for gate in _gates(reference())]
    draws = [[torch.randperm(width, generator=generator)[:kept] for width in widths] for _ in range(DRAWS)]
    return torch.tensor([_mean_ks(keeps) for keeps in draws], dtype=torch.float64)


def _beats_chance(method: PruneNet) -> Outcome:
    found: dict[str, float] = {}
    for seed in SEEDS:
        model = compress(reference(), method, seed=seed)
        found[f"mean_ks_seed_{seed}"] = _mean_ks([entry.keep for entry in Plan.of_model(model).entries])
    gates = _gates(reference())
    kept = method.width(len(gates[0]))
    chance = _chance(kept)
    bound = float(chance.mean() - 2 * chance.std())
    loudest = [gate.norm(dim=1).topk(kept).indices for gate in gates]
    baseline = {
        "random_mean_ks": float(chance.mean()),
        "random_mean_ks_standard_deviation": float(chance.std()),
        "largest_rows_mean_ks": _mean_ks(loudest),
    }
    return Outcome(found, baseline, holds=all(found[f"mean_ks_seed_{seed}"] <= bound for seed in SEEDS))


def policy_beats_chance() -> Outcome:
    return _beats_chance(PruneNet())


def policy_with_the_gradient_of_what_was_drawn_beats_chance() -> Outcome:
    return _beats_chance(PruneNet(**LONGER))  # type: ignore[arg-type]


def closer_than_random_neurons() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        own, random = (measured(method, seed=seed) for method in (PruneNet(), Neurons(score="random")))
        found |= {
            f"kl_nats_per_token_seed_{seed}": own.kl,
            f"kl_difference_high_seed_{seed}": own.divergence.kl_difference(random.divergence).high,
            "bytes_at_rest": own.bytes_at_rest,
        }
        baseline |= {f"random_kl_nats_per_token_seed_{seed}": random.kl, "random_bytes_at_rest": random.bytes_at_rest}
    baseline["largest_rows_kl_nats_per_token"] = measured(Neurons(score="row_norm")).kl
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in SEEDS))


def one_policy_for_other_sparsities() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            policy = str(Path(folder) / f"policy-{seed}.safetensors")
            compress(reference(), PruneNet(sparsity=0.4, policy=policy), seed=seed)
            reused = measured(PruneNet(sparsity=0.2, policy=policy), seed=seed).kl
            own = measured(PruneNet(sparsity=0.2), seed=seed).kl
            random = measured(Neurons(sparsity=0.2, score="random"), seed=seed).kl
            found[f"kl_nats_per_token_seed_{seed}"] = reused
            baseline |= {
                f"trained_for_it_kl_nats_per_token_seed_{seed}": own,
                f"random_kl_nats_per_token_seed_{seed}": random,
            }
            holds &= reused <= 1.1 * own
    return Outcome(found, baseline, holds)


_PAPER = method_info("prunenet").paper
_SPECTRA = (
    "ref, 30 % of the neurons of every block, three seeds: the Kolmogorov-Smirnov distance between the singular values "
    f"of a gate and of what is kept of it, mean over blocks; {DRAWS} random choices and the largest rows beside "
    "it. Holds if for each seed it is at least two standard deviations of the random choices below their mean"
)

CLAIMS = (
    Claim(
        "prunenet",
        _PAPER,
        "A policy trained on weights alone keeps more of the spectrum than chance does.",
        f"{_SPECTRA}. The published update, 20 episodes.",
        policy_beats_chance,
    ),
    Claim(
        "prunenet",
        _PAPER,
        "With the gradient of what was drawn, and for longer, the policy keeps more of the spectrum than chance does.",
        f"{_SPECTRA}. update=on_policy (not the paper's), 200 episodes at a tenth of the rate, action=top_k.",
        policy_with_the_gradient_of_what_was_drawn_beats_chance,
    ),
    Claim(
        "prunenet",
        _PAPER,
        "Without calibration text it is closer to the original model than removing random neurons.",
        f"ref, 30 % of the neurons of every block, {MEASURED}; three seeds. Holds if for each the paired 95 % interval "
        "of the difference in KL to random neurons lies below zero; the rows of largest norm beside it",
        closer_than_random_neurons,
    ),
    Claim(
        "prunenet",
        _PAPER,
        "A policy trained at 40 % serves at 20 % as well as one trained there.",
        f"ref, {MEASURED}; three seeds. Holds if for each the KL is at most 1.1 times that of a policy trained at "
        "20 %; random neurons beside it",
        one_policy_for_other_sparsities,
    ),
)
