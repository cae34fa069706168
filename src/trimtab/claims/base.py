"""The contract of claims: what a paper says, the smallest honest experiment that could refute it, and the verdict.

One file per published system, named as its method; it defines `CLAIMS: tuple[Claim, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment measured, with the trivial baseline's figure beside it.

    measured, baseline   name -> number, units in the names (`kl_nats_per_token`, `bytes_at_rest`)
    holds                whether the claim holds on these numbers, by the rule that the experiment's text states
    """

    measured: Mapping[str, float]
    baseline: Mapping[str, float]
    holds: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """claim: the paper's statement in one sentence; experiment: what is run here and the rule for `holds`."""

    system: str
    paper: str
    claim: str
    experiment: str
    run: Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of `trimtab claims NAME --json`: these keys and no others."""

    system: str
    paper: str
    claim: str
    experiment: str
    measured: Mapping[str, float]
    baseline: Mapping[str, float]
    holds: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {"measured": dict(self.measured), "baseline": dict(self.baseline)}
