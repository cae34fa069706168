"""The one room that knows Hugging Face layouts: load, save, views, calibration. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.models.calibration_set import CalibrationSet as CalibrationSet
    from trimtab.models.compressed_linear import CompressedLinear as CompressedLinear
    from trimtab.models.counting import ledger_of as ledger_of
    from trimtab.models.info import ModelInfo as ModelInfo
    from trimtab.models.info import info_of as info_of
    from trimtab.models.info import tokenizer_of as tokenizer_of
    from trimtab.models.loading import load as load
    from trimtab.models.random import random_model as random_model
    from trimtab.models.saving import save as save
    from trimtab.models.views import ModelView as ModelView

__all__ = [
    "CalibrationSet",
    "CompressedLinear",
    "ModelInfo",
    "ModelView",
    "info_of",
    "ledger_of",
    "load",
    "random_model",
    "save",
    "tokenizer_of",
]

_LAZY = {
    "CalibrationSet": "calibration_set",
    "CompressedLinear": "compressed_linear",
    "ModelInfo": "info",
    "ModelView": "views",
    "info_of": "info",
    "ledger_of": "counting",
    "load": "loading",
    "random_model": "random",
    "save": "saving",
    "tokenizer_of": "info",
}


def __getattr__(name: str) -> Any:
    # `import trimtab` imports this package for registration.py, so nothing here may import torch beforehand
    if name in _LAZY:
        return getattr(importlib.import_module(f"trimtab.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'trimtab.models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
