"""trimtab: make open language models smaller, faster, cheaper to adapt, and prove what each intervention cost.

>>> import trimtab as tt
>>> model = tt.load("ref")
>>> model = tt.compress(model, tt.weights.Gptq(bits=4))
>>> tt.save(model, "out")

Importing this package is light: torch and transformers come with the first use. It also registers the trimtab
checkpoint format, so that `AutoModelForCausalLM.from_pretrained` reads a trimtab directory afterwards.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.models.registration import register_when_transformers_loads

if TYPE_CHECKING:
    from trimtab import weights as weights
    from trimtab.core.recipe import Recipe as Recipe
    from trimtab.evaluation import evaluate as evaluate
    from trimtab.models import ModelView as ModelView
    from trimtab.models import load as load
    from trimtab.models import save as save
    from trimtab.weights import compress as compress

__version__ = "0.1.0"

_LAZY = {
    "load": "trimtab.models",
    "save": "trimtab.models",
    "ModelView": "trimtab.models",
    "compress": "trimtab.weights",
    "evaluate": "trimtab.evaluation",
    "Recipe": "trimtab.core.recipe",
}
_ROOMS = ("weights",)

register_when_transformers_loads()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"trimtab.{name}")
    raise AttributeError(f"module 'trimtab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_ROOMS])
