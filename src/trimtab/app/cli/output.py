"""What commands write: tables or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def _plain(value: Any) -> Any:
    """JSON has no infinity: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def emit_json(document: object) -> None:
    """Write one JSON document as the last line of standard output."""
    sys.stdout.write(json.dumps(_plain(document), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    """One line for a person, on standard error so that standard output stays the result."""
    print(message, file=sys.stderr, flush=True)


def complain(error: Exception) -> None:
    """The one message of an error that the user can mend."""
    say(f"trimtab: {type(error).__name__}: {error}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table; the columns named in `right` hold numbers. Cells are shown as they are, without markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def wide_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Table]:
    """A table of figures that is cut into several, each with the first column, where the terminal is too narrow."""
    longest = [
        max(len(line) for text in (*(row[i] for row in rows), *columns[i].split()) for line in text.split("\n"))
        for i in range(len(columns))
    ]
    available = _console().width
    parts: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        if parts[-1] and 2 + longest[0] + sum(3 + longest[k] for k in [*parts[-1], i]) > available:
            parts.append([])
        parts[-1].append(i)
    tables = []
    for number, part in enumerate(parts):
        shown = [0, *part]
        headers = ["\n".join(textwrap.wrap(columns[i], longest[i])) for i in shown]
        cells = [[row[i] for i in shown] for row in rows]
        tables.append(table("" if number else title, headers, cells, right=headers[1:]))
    return tables


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def show(*parts: object) -> None:
    """Write tables or text to standard output; 200 columns wide where it is not a terminal."""
    console = _console()
    for part in parts:
        console.print(part)
