"""Claims of magnitude pruning: small weights matter least, and a tenth to a third of all can go unnoticed."""

from __future__ import annotations

from trimtab.claims._pruning import random_kl
from trimtab.claims._reference import MEASURED, SEEDS, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Magnitude

__all__ = ["CLAIMS"]

SHARES = (10, 30, 50)


def _pruned(sparsity: float | str) -> Magnitude:
    return Magnitude(sparsity=sparsity, value_dtype="bfloat16")


def small_weights_matter_least() -> Outcome:
    found = {f"kl_nats_per_token_{share}_percent": measured(_pruned(f"{share}%")).kl for share in SHARES}
    baseline = {
        f"random_kl_nats_per_token_{share}_percent_seed_{seed}": random_kl(share / 100, seed)
        for share in SHARES
        for seed in SEEDS
    }
    holds = all(
        found[f"kl_nats_per_token_{share}_percent"]
        < min(baseline[f"random_kl_nats_per_token_{share}_percent_seed_{seed}"] for seed in SEEDS) / 2
        for share in SHARES
    )
    return Outcome(found, baseline, holds)


def patterns_cost_more() -> Outcome:
    found = {f"kl_nats_per_token_{name.replace(':', '_of_')}": measured(_pruned(name)).kl for name in ("2:4", "4:8")}
    free = measured(_pruned(0.5))
    ordered = free.kl < found["kl_nats_per_token_4_of_8"] < found["kl_nats_per_token_2_of_4"]
    found["bytes_at_rest_2_of_4"] = measured(_pruned("2:4")).bytes_at_rest
    baseline = {"unstructured_kl_nats_per_token": free.kl, "unstructured_bytes_at_rest": free.bytes_at_rest}
    return Outcome(found, baseline, ordered)


_PAPER = method_info("magnitude").paper

CLAIMS = (
    Claim(
        "magnitude",
        _PAPER,
        "Weights of small magnitude matter least.",
        f"ref without 10, 30 and 50 % of each matrix, {MEASURED}. Holds if the KL is less than half of that of "
        "removing as many at random, for each share and each of three seeds.",
        small_weights_matter_least,
    ),
    Claim(
        "magnitude",
        "N:M patterns: Zhou et al., arXiv:2102.04010; one-shot figures: Wanda, arXiv:2306.11695",
        "At 50 % the tighter the pattern, the larger the loss: unstructured, then 4:8, then 2:4.",
        f"ref, {MEASURED}. Holds if the KL rises in this order.",
        patterns_cost_more,
    ),
)
