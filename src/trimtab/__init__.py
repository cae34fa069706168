"""trimtab: make open language models smaller, faster, cheaper to adapt, and prove what each intervention cost.

>>> import trimtab as tt
>>> model = tt.load("ref")
>>> model = tt.compress(model, tt.weights.Gptq(bits=4))
>>> tt.save(model, "out")

Importing this package is light: torch and transformers come with the first use. It also registers the trimtab
checkpoint format, so that `AutoModelForCausalLM.from_pretrained` reads a trimtab directory afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.models.registration import register_when_transformers_loads

if TYPE_CHECKING:
    from trimtab import cache as cache
    from trimtab import decoding as decoding
    from trimtab import layers as layers
    from trimtab import weights as weights
    from trimtab.core.recipe import Recipe as Recipe
    from trimtab.evaluation import evaluate as evaluate
    from trimtab.models import ModelView as ModelView
    from trimtab.models import export as export
    from trimtab.models import load as load
    from trimtab.models import save as save
    from trimtab.models.compression import compress as compress

__version__ = "0.1.0"

register_when_transformers_loads()

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "load": "models",
        "save": "models",
        "export": "models",
        "ModelView": "models",
        "compress": "models.compression",
        "evaluate": "evaluation",
        "Recipe": "core.recipe",
        "cache": "cache",
        "decoding": "decoding",
        "layers": "layers",
        "weights": "weights",
    },
)
