"""Claims of the plain scores of neurons: what a choice is worth, and what the repair is."""

from __future__ import annotations

from trimtab.claims._reference import SEEDS, SETTING, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.weights import Neurons

__all__ = ["CLAIMS"]


def _closer(pairs: dict[str, tuple[Neurons, Neurons]]) -> Outcome:
    """Whether the first of each pair is closer to `ref` than the second, by the rule _RULE."""
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for name, (method, other) in pairs.items():
        for seed in SEEDS:
            own, against = (
                measured(m, seed=seed if m.needs_text or m.score == "random" else 0) for m in (method, other)
            )
            high = own.divergence.kl_difference(against.divergence).high
            found |= {
                f"{name}_kl_nats_per_token_seed_{seed}": own.kl,
                f"{name}_kl_difference_high_seed_{seed}": high,
                "bytes_at_rest": own.bytes_at_rest,
            }
            baseline |= {
                f"{name}_other_kl_nats_per_token_seed_{seed}": against.kl,
                "other_bytes_at_rest": against.bytes_at_rest,
            }
            holds &= high < 0
    return Outcome(found, baseline, holds)


def repair_helps_every_choice() -> Outcome:
    scores = ("random", "row_norm", "energy_down")
    return _closer({s: (Neurons(score=s, repair="least_squares"), Neurons(score=s)) for s in scores})  # type: ignore[arg-type]


def largest_rows_beat_random_ones() -> Outcome:
    return _closer({"row_norm": (Neurons(score="row_norm"), Neurons(score="random"))})


def what_a_neuron_adds_beats_its_rows() -> Outcome:
    return _closer({"energy_down": (Neurons(score="energy_down"), Neurons(score="row_norm"))})


def what_a_neuron_adds_beats_its_energy() -> Outcome:
    return _closer(
        {
            "energy_down": (
                Neurons(score="energy_down", repair="least_squares"),
                Neurons(score="energy", repair="least_squares"),
            )
        }
    )


_PAPER = method_info("neurons").paper
_RULE = (
    "Holds if the paired 95 % interval of the difference in KL lies below zero for each of three seeds of the "
    "calibration text and of what is drawn"
)
_WHERE = f"ref, 30 % of the neurons of every block, {SETTING}. {_RULE}"

CLAIMS = (
    Claim(
        "neurons",
        _PAPER,
        "Making up for removed neurons by least squares helps, however they were chosen.",
        f"{_WHERE}, for each of random, row_norm and energy_down.",
        repair_helps_every_choice,
    ),
    Claim(
        "neurons",
        _PAPER,
        "Keeping the largest rows beats keeping random ones.",
        f"{_WHERE}.",
        largest_rows_beat_random_ones,
    ),
    Claim(
        "neurons",
        _PAPER,
        "Keeping the neurons that add most to the output beats keeping the largest rows.",
        f"{_WHERE}.",
        what_a_neuron_adds_beats_its_rows,
    ),
    Claim(
        "neurons",
        _PAPER,
        "With repair, energy times the square of the column of down beats energy alone.",
        f"{_WHERE}.",
        what_a_neuron_adds_beats_its_energy,
    ),
)
