"""What all methods share: options, a name, a room, a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from trimtab.core.config import Config
from trimtab.core.registry import MethodInfo, method_info

if TYPE_CHECKING:
    from trimtab.core.recipe import Step


class Method(Config):
    """A published method: its options are its fields, its name is its file's. One subclass per room in `base.py`."""

    room: ClassVar[str]

    @classmethod
    def name(cls) -> str:
        """The registry key: the name of the file the class stands in."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def info(cls) -> MethodInfo:
        return method_info(cls.name())

    @classmethod
    def refuses_after(cls, earlier: Sequence[Step]) -> str | None:
        """Why this method cannot follow these steps in a recipe, or None if it can."""
        return None
