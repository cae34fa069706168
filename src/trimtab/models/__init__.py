"""The one room that knows Hugging Face layouts: load, save, views, calibration. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.models.calibration_set import CalibrationSet as CalibrationSet
    from trimtab.models.compressed_linear import CompressedLinear as CompressedLinear
    from trimtab.models.counting import ledger_of as ledger_of
    from trimtab.models.exports import export as export
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
    "export",
    "info_of",
    "ledger_of",
    "load",
    "random_model",
    "save",
    "tokenizer_of",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CalibrationSet": "calibration_set",
        "CompressedLinear": "compressed_linear",
        "ModelInfo": "info",
        "ModelView": "views",
        "export": "exports",
        "info_of": "info",
        "ledger_of": "counting",
        "load": "loading",
        "random_model": "random",
        "save": "saving",
        "tokenizer_of": "info",
    },
)
