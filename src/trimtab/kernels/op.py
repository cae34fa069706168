"""The pattern of an operation: a plain reference, fast backends beside it, and a choice that explains itself.

`TRIMTAB_KERNELS` forces a backend by name (reference, native, triton); a forced backend that cannot run the input
raises KernelUnavailable, it never falls back. Without it, the first backend that does not refuse runs.
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
log = logging.getLogger("trimtab.kernels")

ENVIRONMENT_VARIABLE = "TRIMTAB_KERNELS"


@dataclass(frozen=True, slots=True)
class Backend(Generic[P, R]):
    """A fast path. `absent()` says why it cannot run on this machine at all; `refuses(*args)` why not on this input.

    Both return None if it can.
    """

    name: str
    run: Callable[P, R]
    absent: Callable[[], str | None]
    refuses: Callable[P, str | None]


@dataclass(slots=True)
class KernelOp(Generic[P, R]):
    """An operation: call it with the arguments of its reference."""

    name: str
    reference: Callable[P, R]
    backends: tuple[Backend[P, R], ...]
    _said: set[str] = field(default_factory=set)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        forced = os.environ.get(ENVIRONMENT_VARIABLE)
        if forced:
            return self._forced(forced)(*args, **kwargs)
        for backend in self.backends:
            reason = backend.absent() or backend.refuses(*args, **kwargs)
            if reason is None:
                return backend.run(*args, **kwargs)
            self._say_once(backend.name, reason)
        return self.reference(*args, **kwargs)

    def _forced(self, name: str) -> Callable[P, R]:
        if name == "reference":
            return self.reference
        backend = next((b for b in self.backends if b.name == name), None)
        if backend is None:
            known = ["reference", *(b.name for b in self.backends)]
            raise ConfigError(f"{ENVIRONMENT_VARIABLE}={name}: {self.name} has no such backend. {did_you_mean(name, known)}")
        chosen = backend

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            reason = chosen.absent() or chosen.refuses(*args, **kwargs)
            if reason is not None:
                raise KernelUnavailable(
                    f"{ENVIRONMENT_VARIABLE}={name}, but {self.name} cannot use it: {reason}. Unset the variable to let "
                    "trimtab choose."
                )
            return chosen.run(*args, **kwargs)

        return run

    def _say_once(self, backend: str, reason: str) -> None:
        message = f"{self.name}: not using {backend}: {reason}"
        if message not in self._said:
            self._said.add(message)
            log.info(message)
