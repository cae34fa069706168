"""What commands write: tables or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.core.errors import TrimtabError


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


def complain(error: TrimtabError) -> None:
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


def show(*parts: object) -> None:
    """Write tables or text to standard output; as wide as needed where it is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for part in parts:
        console.print(part)
