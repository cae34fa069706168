"""A draft: tokens that may be taken back, and what is needed to take them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.core.errors import DataError


@dataclass
class Draft:
    """Where a layer stood at `begin()`, and what has come since.

    length      tokens as masks count them, padding included
    lengths     for each row, its tokens
    windows     for each group and row, tokens in the window of keys and in that of values
    columns     for each row, which of the columns since `begin()` are tokens and no padding
    positions   for each row, the positions of these tokens, where keys are kept before rotary embedding
    """

    length: int
    lengths: list[int]
    windows: list[list[tuple[int, int]]]
    columns: list[list[int]]
    positions: list[list[int]]

    def stored(self, path: Sequence[int], row: int) -> list[int]:
        """Columns of a path as indices among the row's drafted tokens. Raises DataError for one that is padding."""
        index = {column: index for index, column in enumerate(self.columns[row])}
        if missing := [column for column in path if column not in index]:
            raise DataError(f"commit: drafted token {missing[0]} is padding in row {row}.")
        return [index[column] for column in path]

    def select(self, rows: Sequence[int]) -> Draft:
        """The draft whose row i is this one's rows[i]."""
        return Draft(
            self.length,
            [self.lengths[row] for row in rows],
            [[of_group[row] for row in rows] for of_group in self.windows],
            [list(self.columns[row]) for row in rows],
            [list(self.positions[row]) for row in rows],
        )
