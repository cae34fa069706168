"""The base of every method's options: a frozen, keyword-only dataclass that knows its own constraints."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


_READERS: dict[type, dict[str, Any]] = {}


def _readers(owner: type) -> dict[str, Any]:
    """Field name -> pydantic reader of its type, for the config class `owner`."""
    if owner not in _READERS:
        from pydantic import TypeAdapter  # only where values arrive, so that listings stay fast

        hints = typing.get_type_hints(owner)
        _READERS[owner] = {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(owner)}
    return _READERS[owner]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one component. Field types are checked when it is built, then `check()` is called.

    Subclasses are `@dataclass(frozen=True, kw_only=True)`, override `check` for the constraints that types do not
    say, and raise ConfigError naming the option, its value and the allowed range.
    """

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                _readers(type(self))[field.name].validate_python(value, strict=not isinstance(value, (list, tuple)))
            except ValidationError as error:
                raise self._refusal(field.name, value, error) from None
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the options do not fit together. The default accepts all."""

    @classmethod
    def _refusal(cls, name: str, value: object, error: Any) -> ConfigError:
        reason = error.errors()[0]["msg"]
        return ConfigError(f"{cls.__name__}: option {name}={value!r} cannot be used: {reason}.")

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Self:
        """Build from loosely typed options, such as `bits=4` from the command line.

        Strings are read as the field's type ("true", "4", "0.01"). Raises ConfigError for an unknown or a missing
        option and for a value that cannot be read.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, object] = {}
        for name, value in options.items():
            if name not in fields:
                raise ConfigError(f"{cls.__name__} has no option '{name}'. {did_you_mean(name, fields)}")
            values[name] = cls._read(name, value)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [n for n in required if n not in values]:
            raise ConfigError(f"{cls.__name__} needs the option '{missing[0]}', which has no default.")
        return cls(**values)

    @classmethod
    def _read(cls, name: str, value: object) -> object:
        """The value as the field's type; a string also as the number it spells, or as items between commas."""
        from pydantic import ValidationError

        readings = [value]
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                readings.append(int(value))
            readings.append(tuple(item.strip() for item in value.split(",")))
        refusal: ConfigError | None = None
        for reading in readings:
            try:
                return _readers(cls)[name].validate_python(reading)
            except ValidationError as error:
                refusal = refusal or cls._refusal(name, value, error)
        assert refusal is not None
        raise refusal from None

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, complete with defaults."""
        return dataclasses.asdict(self)
