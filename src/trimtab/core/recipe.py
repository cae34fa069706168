"""An ordered, serialisable description of what is done to a model: checked when built, stored in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import CompositionError, ConfigError
from trimtab.core.method import Method
from trimtab.core.registry import method_class, method_info

RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One method with all its options resolved."""

    method: str
    options: Mapping[str, Any]

    @property
    def room(self) -> str:
        return method_info(self.method).room

    def build(self) -> Method:
        """The method object. Raises ConfigError on options the method does not have or accept."""
        cls = method_class(self.method)
        assert issubclass(cls, Method)
        return cls.from_options(self.options)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Methods in the order in which they are applied.

    Raises ConfigError for unknown methods and options, CompositionError for methods that cannot follow one another.
    YAML form: `version: 1` and `steps: [{method: gptq, bits: 4}, ...]`.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for index, step in enumerate(self.steps):
            refusal = type(step.build()).refuses_after(self.steps[:index])
            if refusal:
                raise CompositionError(f"recipe step {index + 1} ('{step.method}'): {refusal}")

    @classmethod
    def of(cls, *methods: Method) -> Recipe:
        return cls(tuple(Step(type(m).name(), m.to_dict()) for m in methods))

    def methods(self) -> list[Method]:
        return [step.build() for step in self.steps]

    def then(self, other: Recipe) -> Recipe:
        """This recipe followed by another."""
        return Recipe(self.steps + other.steps)

    def to_dict(self) -> dict[str, Any]:
        return {"version": RECIPE_VERSION, "steps": [{"method": s.method, **s.options} for s in self.steps]}

    @classmethod
    def from_dict(cls, data: object, source: str = "recipe") -> Recipe:
        """Read the form of `to_dict`. Raises ConfigError naming the entry that is wrong."""
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), Sequence):
            raise ConfigError(f"{source}: a recipe is a mapping with a list 'steps', each with a 'method'.")
        if unknown := set(data) - {"version", "steps"}:
            raise ConfigError(f"{source}: unknown entries {sorted(unknown)}; a recipe has 'version' and 'steps'.")
        if data.get("version", RECIPE_VERSION) > RECIPE_VERSION:
            raise ConfigError(
                f"{source}: recipe version {data['version']} is newer than {RECIPE_VERSION}; update trimtab."
            )
        steps = []
        for index, entry in enumerate(data["steps"]):
            if not isinstance(entry, Mapping) or "method" not in entry:
                raise ConfigError(f"{source}: step {index + 1} has no 'method': {entry!r}")
            options = {k: v for k, v in entry.items() if k != "method"}
            info = method_info(str(entry["method"]))
            resolved = method_class(info.name).from_options(options).to_dict()  # type: ignore[attr-defined]
            steps.append(Step(info.name, resolved))
        return cls(tuple(steps))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        import yaml

        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from None
        return cls.from_dict(data, source=str(path))
