"""The pattern of every operation: a plain reference, faster backends, and a choice that explains itself.

An operation is five things: `reference.py` in plain PyTorch; backends beside it with the same signature; this dispatch;
a parity suite in tests/kernels; a benchmark that prints no speed when parity is red (bench.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, TypeVar

from trimtab.core.errors import ConfigError, KernelUnavailable, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

KERNELS_VARIABLE = "TRIMTAB_KERNELS"
"""Environment variable: the only backend allowed, or "reference". Empty: the first that does not refuse."""

log = logging.getLogger("trimtab.kernels")


@dataclass(frozen=True, slots=True)
class Backend(Generic[P, R]):
    """A faster way to compute an operation.

    run       called with the reference's arguments, after neither of the others refused
    absent    why it cannot run on this machine, in words, or None
    refuses   why it cannot take these arguments, in words, or None
    """

    name: str
    run: Callable[P, R]
    absent: Callable[[], str | None]
    refuses: Callable[P, str | None]


@dataclass(frozen=True, slots=True)
class KernelOp(Generic[P, R]):
    """An operation, called as its reference. `backends` are tried in order; choices and reasons are logged once."""

    name: str
    reference: Callable[P, R]
    backends: tuple[Backend[P, R], ...]
    _logged: set[str] = field(default_factory=set)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if forced := os.environ.get(KERNELS_VARIABLE):
            return self._run_forced(forced, *args, **kwargs)
        for backend in self.backends:
            reason = backend.absent() or backend.refuses(*args, **kwargs)
            if reason is None:
                self._log_once(f"{self.name} runs on {backend.name}")
                return backend.run(*args, **kwargs)
            self._log_once(f"{self.name} does not run on {backend.name}: {reason}")
        self._log_once(f"{self.name} runs on its reference")
        return self.reference(*args, **kwargs)

    def _run_forced(self, name: str, *args: P.args, **kwargs: P.kwargs) -> R:
        if name == "reference":
            return self.reference(*args, **kwargs)
        backend = next((b for b in self.backends if b.name == name), None)
        if backend is None:
            known = ["reference", *(b.name for b in self.backends)]
            raise ConfigError(
                f"{KERNELS_VARIABLE}={name}: {self.name} has no such backend. {did_you_mean(name, known)}"
            )
        if reason := backend.absent() or backend.refuses(*args, **kwargs):
            raise KernelUnavailable(
                f"{KERNELS_VARIABLE}={name}, but {self.name} cannot run on it: {reason}. "
                f"Unset {KERNELS_VARIABLE} to let trimtab choose."
            )
        return backend.run(*args, **kwargs)

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            log.info(message)
