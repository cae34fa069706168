"""Packages whose names are imported on first use, so that importing the package stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package that offers each name of `modules` from the module beside it.

    modules   public name -> module relative to `package` ("loading", "core.recipe"); a name equal to its module is the
              module itself, as `trimtab.weights` is

    >>> __getattr__, __dir__ = lazy_exports(__name__, {"load": "loading"})
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module = importlib.import_module(f"{package}.{modules[name]}")
        return module if modules[name] == name else getattr(module, name)

    def names() -> list[str]:
        return sorted(modules)

    return get, names
