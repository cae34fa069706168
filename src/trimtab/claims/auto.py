"""Claims of auto: better than every single method at the same honest bytes."""

from __future__ import annotations

import functools

from trimtab.cache import Auto, Gear, Kivi, Kvquant, RotateKV
from trimtab.cache.base import CacheMethod
from trimtab.claims._caches import MEASURED, Measured, closer, figures, measured
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]

BUDGETS = (2.5, 3.5)
TOLERANCE = 0.05
"""Bits per element by which auto may exceed its budget: bytes come in whole blocks."""
ADVANTAGE = 0.3
"""Bits per element by which another method may take more than auto, and must still be worse."""

RIVALS: dict[str, CacheMethod] = {
    "kivi_2": Kivi(bits=2, group_size=64, window=64),
    "kivi_3": Kivi(bits=3, group_size=64, window=64),
    "gear_2": Gear(bits=2),
    "kvquant_2": Kvquant(bits=2),
    "kvquant_3": Kvquant(bits=3),
    "rotatekv_2": RotateKV(bits=2),
    "rotatekv_3": RotateKV(bits=3),
}


@functools.cache
def _of_rivals() -> dict[str, Measured]:
    return {name: measured(method) for name, method in RIVALS.items()}


def _beats_all_at(budget: float) -> Outcome:
    ours = measured(Auto(bits_per_element=budget))
    within = {name: found for name, found in _of_rivals().items() if found.bits <= ours.bits + ADVANTAGE}
    return Outcome(
        measured=figures("auto", ours),
        baseline={key: value for name, found in within.items() for key, value in figures(name, found).items()},
        holds=bool(within)
        and ours.bits <= budget + TOLERANCE
        and all(closer(ours, found) for found in within.values()),
    )


CLAIMS = tuple(
    Claim(
        "auto",
        method_info("auto").paper,
        f"At {budget:g} bits per element, everything counted, a measured mixture of components is better than each "
        "method alone.",
        f"ref, {MEASURED}. Holds if auto stays within its budget and its KL is smaller (paired 95 % interval) than "
        f"that of "
        f"each setting of another method, the baselines, that takes at most {ADVANTAGE:g} bits per element more.",
        functools.partial(_beats_all_at, budget),
    )
    for budget in BUDGETS
)
