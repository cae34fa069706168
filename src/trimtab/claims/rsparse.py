"""Claims of R-Sparse: a low-rank copy for small inputs beats thresholds alone, ratios per layer beat one for all."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from trimtab.claims._reference import LENGTH, MEASURED, SEEDS, SEQUENCES, predictions, reference
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import Divergence, divergence
from trimtab.layers import RSparse
from trimtab.models import tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.counting import ledger_of

__all__ = ["CLAIMS"]

TEAL = RSparse(alpha=1.0, criterion="magnitude")
UNIFORM = RSparse(alpha=0.95)
SEARCHED = RSparse(alpha="searched", population=16, generations=6, survivors=4, search_sequences=8)
NEAR = 0.1


@dataclass(frozen=True, slots=True)
class _Sparse:
    """One converted `ref`: how far it is from `ref`, and the share of its weights' numbers that a token reads."""

    divergence: Divergence
    read_share: float

    @property
    def kl(self) -> float:
        return self.divergence.estimates()["kl_nats_per_token"].value


@functools.cache
def _measured(method: RSparse, seed: int) -> _Sparse:
    model = reference()
    dense = ledger_of(model).macs_per_token
    calibration = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH, seed=seed)
    compress(model, method, calibration=calibration, seed=seed, progress=False)
    return _Sparse(divergence(model, predictions()), ledger_of(model).macs_per_token / dense)


def _closer(method: RSparse, other: RSparse, names: tuple[str, str]) -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        own, against = _measured(method, seed), _measured(other, seed)
        found |= {
            f"{names[0]}_kl_nats_per_token_seed_{seed}": own.kl,
            f"kl_difference_high_seed_{seed}": own.divergence.kl_difference(against.divergence).high,
            f"{names[0]}_share_of_macs": own.read_share,
        }
        baseline |= {
            f"{names[1]}_kl_nats_per_token_seed_{seed}": against.kl,
            f"{names[1]}_share_of_macs": against.read_share,
        }
    return Outcome(found, baseline, holds=all(found[f"kl_difference_high_seed_{seed}"] < 0 for seed in SEEDS))


def low_rank_beats_thresholds() -> Outcome:
    return _closer(UNIFORM, TEAL, ("rsparse", "thresholds"))


def searched_beats_uniform() -> Outcome:
    return _closer(SEARCHED, UNIFORM, ("searched", "uniform"))


def searched_beats_thresholds() -> Outcome:
    return _closer(SEARCHED, TEAL, ("searched", "thresholds"))


def half_is_near_dense() -> Outcome:
    found = {f"kl_nats_per_token_seed_{seed}": _measured(SEARCHED, seed).kl for seed in SEEDS}
    least = RSparse(sparsity=0.1, alpha=1.0)
    baseline = {"kl_nats_per_token_at_10_percent": _measured(least, 0).kl}
    return Outcome(found, baseline, holds=max(found.values()) < NEAR)


_PAPER = method_info("rsparse").paper
_SETTING = (
    f"ref, all linears of all blocks at 50 %, calibrated on {SEQUENCES} x {LENGTH} tokens of other prose, {MEASURED}, "
    "every token sparse"
)
_SEARCH = "88 vectors of ratios compared on 8 of the sequences"
_RULE = (
    "Holds if at the same budget of multiplications the paired 95 % interval of the difference in KL to {} lies below "
    "zero for each of three seeds of the calibration text"
)
_THRESHOLDS = "thresholds on |x| alone (alpha = 1, as TEAL)"

CLAIMS = (
    Claim(
        "rsparse",
        _PAPER,
        "Large inputs exactly and the rest through a low-rank copy (alpha 0.95 everywhere) beats thresholds alone.",
        f"{_SETTING}. {_RULE.format(_THRESHOLDS)}.",
        low_rank_beats_thresholds,
    ),
    Claim(
        "rsparse",
        _PAPER,
        "A ratio for each linear, searched on calibration text, beats one ratio for all.",
        f"{_SETTING}, {_SEARCH}. {_RULE.format('alpha 0.95 everywhere')}.",
        searched_beats_uniform,
    ),
    Claim(
        "rsparse",
        _PAPER,
        "With searched ratios it beats activation sparsity without a low-rank copy.",
        f"{_SETTING}, {_SEARCH}. {_RULE.format(_THRESHOLDS)}.",
        searched_beats_thresholds,
    ),
    Claim(
        "rsparse",
        _PAPER,
        "At 50 % the model is comparable to the dense one.",
        f"{_SETTING}, {_SEARCH}. Holds if the KL to ref stays below {NEAR} nats per token for each of three seeds.",
        half_is_near_dense,
    ),
)
