"""Which methods exist. Reads file names and docstrings, so listing imports no method and no torch.

A method is a file in a method room whose name does not begin with an underscore and is not `base.py`.
The file name is the registry key. Its docstring is

    Summary in one line.

    Paper: Authors, "Title", venue year, arXiv:NNNN.NNNNN.

and `__all__` names the method's class first.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from trimtab.core.errors import ConfigError, did_you_mean

METHOD_ROOMS = ("weights", "cache", "layers", "decoding", "adapters", "steering")

_PACKAGE = Path(__file__).resolve().parent.parent
_DOCSTRING = re.compile(r'\A(?:\s|#[^\n]*\n)*"""(.*?)"""', re.DOTALL)
_PAPER = re.compile(r"^Paper:\s*(.+?)(?:\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
_EXPORTS = re.compile(r"^__all__\s*=\s*\[\s*[\"'](\w+)[\"']", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What a listing shows of one method, read without importing it."""

    name: str
    room: str
    summary: str
    paper: str
    class_name: str

    @property
    def module(self) -> str:
        return f"trimtab.{self.room}.{self.name}"


def read_info(path: Path, room: str) -> MethodInfo:
    """Read one method file. Raises ConfigError if its docstring or `__all__` misses a part."""
    source = path.read_text(encoding="utf-8")
    docstring = _DOCSTRING.match(source)
    paper = _PAPER.search(docstring.group(1)) if docstring else None
    exports = _EXPORTS.search(source)
    if docstring is None or paper is None or exports is None:
        raise ConfigError(
            f"{path}: a method file needs a docstring with a summary line and a 'Paper:' paragraph, and __all__ "
            "naming its class first (see trimtab/core/registry.py)."
        )
    summary = docstring.group(1).strip().splitlines()[0].strip()
    return MethodInfo(path.stem, room, summary, " ".join(paper.group(1).split()), exports.group(1))


@functools.cache
def methods() -> dict[str, MethodInfo]:
    """All methods by name, in the order of the rooms and then of the alphabet."""
    found: dict[str, MethodInfo] = {}
    for room in METHOD_ROOMS:
        for path in sorted((_PACKAGE / room).glob("*.py")):
            if path.name.startswith("_") or path.name == "base.py":
                continue
            found[path.stem] = read_info(path, room)
    return found


def method_info(name: str) -> MethodInfo:
    """The method of this name ('-' and '_' are the same). Raises ConfigError with a suggestion."""
    key = name.strip().lower().replace("-", "_")
    known = methods()
    if key not in known:
        raise ConfigError(
            f"unknown method '{name}'. {did_you_mean(key, known)} Describe one with: trimtab describe NAME"
        )
    return known[key]


def method_class(name: str) -> type:
    """Import the method and return its class."""
    info = method_info(name)
    return getattr(importlib.import_module(info.module), info.class_name)  # type: ignore[no-any-return]


def room_exports(room: str) -> dict[str, str]:
    """Class name -> module of the methods in a room, which `trimtab.<room>.<Class>` imports on first use."""
    return {info.class_name: info.name for info in methods().values() if info.room == room}
