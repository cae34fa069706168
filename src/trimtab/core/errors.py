"""One tree of errors. A message names the thing, shows the values and gives the way out.

TrimtabError
    ConfigError          an option, name or combination of options the user gave
    TargetError          a module or layer that a method was asked to change
    CompositionError     methods that do not combine, or combine in another order
    MissingExtra         an optional dependency that is not installed
    DataError            text or examples that cannot be used (empty, not UTF-8, too short)
    NumericsError        NaN or infinity in weights or activations
    CheckpointError      a model directory that is missing, damaged, foreign or too new
    OutputError          a place that cannot be written to
    KernelUnavailable    a fast path that was asked for by name and cannot run here
    BudgetError          a budget that nothing fits into
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of all errors that trimtab raises on purpose; the command line exits with status 2."""


class ConfigError(TrimtabError):
    """An option, a name or a combination of options that cannot be used."""


class TargetError(TrimtabError):
    """A module that a method was asked to change is missing or does not fit the method."""


class CompositionError(TrimtabError):
    """Methods that do not combine, or only in another order."""


class MissingExtra(TrimtabError):
    """An optional dependency is not installed; the message holds the install line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'trimtab[{extra}]'")


class DataError(TrimtabError):
    """Text or examples that cannot be used."""


class NumericsError(TrimtabError):
    """NaN or infinity where a number is needed; the message names the module."""


class CheckpointError(TrimtabError):
    """A model directory that is missing, damaged, written for another model or by a newer trimtab."""


class OutputError(TrimtabError):
    """A place that cannot be written to; what was there before is unchanged."""


class KernelUnavailable(TrimtabError):
    """A fast path that was asked for by name cannot run here; the message says why."""


class BudgetError(TrimtabError):
    """No choice fits the budget; the message names the smallest that would."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name: the closest known ones, then all of them (at most 40).

    >>> did_you_mean("gtpq", ["gptq", "rtn"])
    "Did you mean 'gptq'? Known: gptq, rtn."
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    listed = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return f"{hint}Known: {listed}." if names else "None are known."
