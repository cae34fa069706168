"""A cache method from its name and options, as the command line and `evaluate` take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.registry import method_class, methods

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod


def cache_names() -> list[str]:
    """The methods of the cache room."""
    return [info.name for info in methods().values() if info.room == "cache"]


def cache_class(name: str) -> type[CacheMethod]:
    """The class of a cache method ('-' and '_' are the same). Raises ConfigError with a suggestion."""
    key = name.strip().lower().replace("-", "_")
    info = methods().get(key)
    if info is None or info.room != "cache":
        kind = "unknown cache" if info is None else f"a method of the room '{info.room}', not a cache:"
        raise ConfigError(f"{kind} '{name}'. {did_you_mean(key, cache_names())}")
    cls: type[CacheMethod] = method_class(key)
    return cls


def cache_method(name: str, options: Mapping[str, object] | None = None) -> CacheMethod:
    """The method with these options. Raises ConfigError for what it does not have or accept."""
    return cache_class(name).from_options(options or {})
