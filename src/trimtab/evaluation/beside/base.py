"""What a benchmark and a system are. Imports none of the systems."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trimtab.core.errors import ConfigError, MissingExtra, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What every benchmark beside other libraries has: a name, and a package with its openers and its `measure`."""

    bench: ClassVar[str]
    package: ClassVar[str]

    seed: int = 0

    @property
    def labels(self) -> dict[str, Any]:
        """What every entry says of the run beside the names of benchmark and system."""
        return {}


@dataclass(frozen=True, slots=True)
class System:
    """A library in one of its configurations.

    name      LIBRARY/VARIANT
    opener    MODULE:FUNCTION of the benchmark's package; called with a directory, the benchmark and `options`, it gives
              what the package's `measure` measures
    needs     what must be installed: name to import -> name to install
    """

    name: str
    opener: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]

    def absent(self) -> str | None:
        """Why it cannot run here, with the way out, or None."""
        for module, package in self.needs.items():
            if not _is_installed(module):
                return str(MissingExtra(package, "peers", self.name))
        return None


def named(known: Sequence[System], names: Sequence[str] | None) -> list[System]:
    """Those of the known systems that have one of these names, or are of one of these libraries; None: all.

    Raises ConfigError for a name that is none of these.
    """
    every = {*(system.name for system in known), *(system.library for system in known)}
    for name in names or ():
        if name not in every:
            raise ConfigError(f"unknown system '{name}'. {did_you_mean(name, every)}")
    return [system for system in known if names is None or {system.name, system.library} & set(names)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
