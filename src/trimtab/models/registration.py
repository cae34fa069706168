"""Tell transformers how to read trimtab checkpoints, without importing transformers before the user does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importlib.abc alone takes longer than all else that `import trimtab` imports
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
"""The module that keeps the table of quantizers; everything that loads a model imports it."""


def register_when_transformers_loads() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are. Calling again changes nothing."""
    if hasattr(sys.modules.get(_REGISTRY), "register_quantizer"):
        register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register() -> None:
    """Enter trimtab into transformers' table of quantizers, if it is not there."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from trimtab.models.quantizer import METHOD, TrimtabQuantizationConfig, TrimtabQuantizer

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(TrimtabQuantizationConfig)
        register_quantizer(METHOD)(TrimtabQuantizer)


class _Watch:
    """Finds the one module through the other finders, and has it followed by the registration."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisterAfter(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _RegisterAfter:
    """Runs the module with its own loader, gives that loader back, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register()
