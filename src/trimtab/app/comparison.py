"""Run several recipes on one model and record what each cost: the work behind `trimtab compare` and `trimtab demo`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.app.cli.options import typed_settings
from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.recipe import Recipe
from trimtab.core.registry import method_class, method_info

UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row: what is done to the model. No recipe: nothing."""

    label: str
    method: str | None = None
    bits: int | None = None
    recipe: Recipe | None = None


def plan(methods: Sequence[str], bits: Sequence[int], settings: Mapping[str, str]) -> list[Variant]:
    """The uncompressed model, then each method at each number of bits (without `bits`: with its own default).

    A setting `option` goes to all methods, a setting `method.option` to one. Raises ConfigError for what a method does
    not have or accept, before anything runs.
    """
    names = [method_info(name).name for name in methods]
    _check_prefixes(names, settings)
    variants = [Variant(UNCOMPRESSED)]
    for count in bits or (None,):
        for name in names:
            cls = method_class(name)
            own = {k: v for k, v in settings.items() if "." not in k}
            own |= {k.partition(".")[2]: v for k, v in settings.items() if k.partition(".")[0] == name and "." in k}
            if count is not None:
                if "bits" in own:
                    raise ConfigError(f"--bits {count} and --set bits={own['bits']} contradict each other.")
                if "bits" not in {f.name for f in dataclasses.fields(cls)}:
                    raise ConfigError(f"method '{name}' has no option 'bits'. Compare it without --bits.")
                own["bits"] = str(count)
            recipe = Recipe.from_dict({"steps": [{"method": name, **typed_settings(cls, own)}]}, source=name)
            chosen = recipe.steps[0].options.get("bits")
            label = name if chosen is None else f"{name} {chosen}-bit"
            variants.append(Variant(label, name, chosen, recipe))
    return variants


def _check_prefixes(names: Sequence[str], settings: Mapping[str, str]) -> None:
    for key in settings:
        prefix, dot, _ = key.partition(".")
        if dot and prefix not in names:
            raise ConfigError(f"--set {key}: '{prefix}' is not among the methods. {did_you_mean(prefix, names)}")
