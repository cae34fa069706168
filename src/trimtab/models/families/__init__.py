"""One file per model family: where it keeps its blocks, norms and linears. Known by `config.model_type`.

To add a family, add a file that builds a `Family`; nothing else needs an edit.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, TargetError, did_you_mean
from trimtab.models.families.base import Family

__all__ = ["Family", "families", "family_by_type", "family_named", "family_of"]


@functools.cache
def families() -> dict[str, Family]:
    """All families by name."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name != "base":
            module = importlib.import_module(f"{__name__}.{info.name}")
            found |= {value.name: value for value in vars(module).values() if isinstance(value, Family)}
    return found


def family_named(name: str) -> Family:
    """The family of this name. Raises ConfigError with a suggestion."""
    if name not in families():
        raise ConfigError(f"unknown model family '{name}'. {did_you_mean(name, families())}")
    return families()[name]


def family_of(model: PreTrainedModel) -> Family:
    """The family that describes this model. Raises TargetError naming its architecture if there is none."""
    return family_by_type(str(model.config.model_type), type(model).__name__)


def family_by_type(model_type: str, model: str = "such a model") -> Family:
    """The family of models with this `config.model_type`. Raises TargetError naming `model` if there is none."""
    for family in families().values():
        if family.model_type == model_type:
            return family
    known = ", ".join(sorted(family.model_type for family in families().values()))
    raise TargetError(
        f"trimtab does not know the layout of {model} (model_type '{model_type}'). Known: {known}. "
        "A new family is one file in trimtab/models/families/."
    )
