"""Find claims by file name and run them."""

from __future__ import annotations

import functools
import importlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trimtab.claims.base import Claim, Verdict
from trimtab.core.errors import ConfigError, NumericsError, did_you_mean


@functools.cache
def claim_names() -> tuple[str, ...]:
    """Systems that have claims, read from the folder; nothing is imported."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(p.stem for p in files if not p.name.startswith("_") and p.name != "base.py"))


def claims_of(name: str) -> tuple[Claim, ...]:
    """The claims of a system ('-' and '_' are the same). Raises ConfigError with a suggestion."""
    key = name.strip().lower().replace("-", "_")
    if key not in claim_names():
        raise ConfigError(f"no claims of a system '{name}'. {did_you_mean(key, claim_names())}")
    claims: tuple[Claim, ...] = importlib.import_module(f"trimtab.claims.{key}").CLAIMS
    return claims


def run_claims(names: str | Sequence[str] | None = None) -> list[Verdict]:
    """Run the experiments of these systems (None: all), in the order of the files; says on stderr which one runs.

    A claim that does not hold is a verdict, not an error. Raises ConfigError for an unknown name, NumericsError if an
    experiment measures NaN.
    """
    chosen = claim_names() if names is None else [names] if isinstance(names, str) else list(names)
    claims = [claim for name in chosen for claim in claims_of(name)]
    verdicts = []
    for number, claim in enumerate(claims, start=1):
        # a line and no bar: compressing and measuring show their own
        print(f"claim {number}/{len(claims)} ({claim.system}): {claim.claim}", file=sys.stderr, flush=True)
        verdicts.append(_verdict(claim))
    return verdicts


def _verdict(claim: Claim) -> Verdict:
    start = time.perf_counter()
    outcome = claim.run()
    seconds = time.perf_counter() - start
    for name, value in [*outcome.measured.items(), *outcome.baseline.items()]:
        if math.isnan(value):
            raise NumericsError(f"the claim '{claim.claim}' ({claim.system}) measured NaN for {name}.")
    return Verdict(
        claim.system,
        claim.paper,
        claim.claim,
        claim.experiment,
        {name: float(value) for name, value in outcome.measured.items()},
        {name: float(value) for name, value in outcome.baseline.items()},
        bool(outcome.holds),
        round(seconds, 2),
    )
