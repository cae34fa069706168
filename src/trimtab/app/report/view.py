"""What a kind of comparison shows: its columns, the cells of its rows, its pictures, and what the columns mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.core.run_record import RunRecord

Cell = tuple[str, str]
"""A figure and its interval, as text; the interval may be empty."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; the baseline is set off."""

    label: str
    baseline: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A comparison, ready to be drawn in the terminal and on the page.

    columns    headers, that of the label first
    pictures   {"svg", "caption"}
    glossary   column -> what it means
    """

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    pictures: tuple[Mapping[str, str], ...]
    glossary: tuple[tuple[str, str], ...]


def view_of(records: Sequence[RunRecord], *, pictures: bool = True) -> View:
    """The view that fits these records of one comparison. Raises DataError for records of something else."""
    from trimtab.app.report import cache_view, decoding_view, weights_view

    kinds: dict[str, Any] = {module.KIND: module for module in (cache_view, decoding_view)}
    module = kinds.get(records[0].config.get("kind", ""), weights_view)
    view: View = module.view(records, pictures=pictures)
    return view
