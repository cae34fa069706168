"""The systems that `trimtab bench decoding` knows, by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.evaluation.beside.base import System, named


def _own(name: str, method: str | None = None, draft: str = "ref-mini", adapt: bool = False, **options: Any) -> System:
    chosen = {"method": method, "draft": draft, "adapt": adapt, "options": options}
    return System(f"trimtab/{name}", "sessions:open_trimtab", chosen)


_SYSTEMS = (
    System("transformers/plain", "sessions:open_transformers", {"assisted": False}),
    System("transformers/assisted", "sessions:open_transformers", {"assisted": True}),
    _own("plain"),
    _own("speculative", "speculative"),
    _own("speculative-adaptive", "speculative", adapt=True),
    _own("speculative-self-4", "speculative", draft="self:4bit"),
    _own("spectr", "spectr", k=4),
    _own("rsd_c", "rsd_c", branching=[2, 2]),
    _own("rsd_s", "rsd_s", width=4),
    _own("useless-draft-adaptive", "speculative", draft="random", adapt=True),
)


def choose(systems: Sequence[str] | None = None) -> list[System]:
    """The systems to measure, in the order of the table; plain decoding of transformers comes first, for its text.

    systems   names, or libraries, which stand for all of theirs; None: all

    Raises ConfigError for a name that is none of these.
    """
    return named(_SYSTEMS, systems)
