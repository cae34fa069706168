"""Claims of weak-to-strong search: it steers a model left as it is, further than the best of N and than logits do."""

from __future__ import annotations

from trimtab.claims._steering import SETTING, TUNED, UNTUNED, Steered, steered
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding.eft import Eft
from trimtab.decoding.weak_to_strong import WeakToStrong

__all__ = ["CLAIMS"]

WIDTH, SUCCESSORS, CHUNK = 4, 4, 5
BEST_OF = 18
"""Samples: a few more than W K, so that the best of them has had at least as many tokens to choose from."""
BETAS = (0.5, 1.0)


def searched() -> Steered:
    return steered(WeakToStrong(tuned=TUNED, untuned=UNTUNED, width=WIDTH, successors=SUCCESSORS, chunk=CHUNK))


def best_of_n() -> Steered:
    return steered(WeakToStrong(tuned=TUNED, untuned=UNTUNED, width=1, successors=BEST_OF, chunk=0))


def _figures(name: str, found: Steered) -> dict[str, float]:
    estimate = found.estimate
    return {
        f"reward_{name}": estimate.value,
        f"reward_{name}_low": estimate.low,
        f"reward_{name}_high": estimate.high,
        f"tokens_{name}": float(found.tokens),
    }


def steers() -> Outcome:
    search, plain, small = searched(), steered(), steered(writer=TUNED)
    gain = search.over(plain)
    return Outcome(
        measured=_figures("search", search) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=_figures("plain", plain) | _figures("small_tuned_model", small),
        holds=gain.low > 0,
    )


def beats_best_of_n() -> Outcome:
    search, best = searched(), best_of_n()
    gain = search.over(best)
    return Outcome(
        measured=_figures("search", search) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=_figures("best_of_n", best),
        holds=gain.low > 0 and best.tokens >= search.tokens,
    )


def beats_logits() -> Outcome:
    search = searched()
    eft = {beta: steered(Eft(tuned=TUNED, untuned=UNTUNED, beta=beta)) for beta in BETAS}
    best = max(eft.values(), key=lambda found: found.estimate.value)
    gain = search.over(best)
    baseline: dict[str, float] = {}
    for beta, found in eft.items():
        baseline |= _figures(f"eft_beta_{beta}", found)
    return Outcome(
        measured=_figures("search", search) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=baseline,
        holds=gain.low > 0,
    )


_PAPER = method_info("weak_to_strong").paper
_SEARCH = f"{SETTING}. Chunks of {CHUNK} tokens, W = {WIDTH}, K = {SUCCESSORS}"

CLAIMS = (
    Claim(
        "weak_to_strong",
        _PAPER,
        "A small tuned and untuned pair steers a larger model that is not trained at all.",
        f"{_SEARCH}. Holds if the reward is above that of ref alone (95 % interval of the differences, prompt by "
        "prompt). Baseline: ref alone, and the small tuned model alone.",
        steers,
    ),
    Claim(
        "weak_to_strong",
        _PAPER,
        "Searching by chunks beats the best of N samples at equal cost.",
        f"{_SEARCH}. Holds if the reward is above that of the best of {BEST_OF} samples, the baseline (95 % interval "
        "of the differences, prompt by prompt), which has at least as many tokens.",
        beats_best_of_n,
    ),
    Claim(
        "weak_to_strong",
        _PAPER,
        "Searching by chunks beats adding the pair's difference to the logits (EFT).",
        f"{_SEARCH}. Holds if the reward is above that of EFT with the better of beta {BETAS[0]} and {BETAS[1]}, the "
        "baseline (95 % interval of the differences, prompt by prompt).",
        beats_logits,
    ),
)
