"""Reading prose: the shipped held-out text or a user's own file, as pieces of about equal length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trimtab.core.errors import DataError
from trimtab.core.files import read_user_text

PIECE_CHARACTERS = 2048


def held_out_prose() -> str:
    """The public-domain prose that trimtab ships for evaluation; no model of the project was trained on it."""
    file = resources.files("trimtab") / "assets" / "text" / "prose_eval.txt"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            "the prose for evaluation is missing from this installation (assets/text/prose_eval.txt). "
            "Reinstall trimtab, or give your own with text=PATH."
        ) from None


def read_text(path: str | Path) -> str:
    """A UTF-8 file, such as WikiText's, its lines ended by "\\n". Raises DataError: missing, empty, or not UTF-8."""
    return read_user_text(path).replace("\r\n", "\n").replace("\r", "\n")


def pieces(text: str, characters: int = PIECE_CHARACTERS) -> list[str]:
    """The whole text cut after white space, each piece at least `characters` long but for the last.

    A last piece of less than half that length is joined to the one before. Nothing is dropped.
    """
    found, begin = [], 0
    while begin < len(text):
        end = begin + characters
        while end < len(text) and not (text[end - 1].isspace() and not text[end].isspace()):
            end += 1
        found.append(text[begin:end])
        begin = end
    if len(found) > 1 and len(found[-1]) < characters / 2:
        found[-2:] = ["".join(found[-2:])]
    return found


def sample(items: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """At most `limit` of the items, drawn by the seed, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = sorted(random.Random(f"trimtab pieces {seed}").sample(range(len(items)), limit))
    return [items[i] for i in chosen]
