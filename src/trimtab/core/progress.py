"""Progress on standard error for anything that takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER_SECONDS = 2.0


@contextmanager
def progress(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar that appears once two seconds have passed. Yields `advance(detail)`: one of `total` steps is done.

    On a terminal it is a live bar with the time left; elsewhere one line each ten seconds. Not `shown`: nothing.
    """
    if not shown:
        yield lambda detail: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    started = last_line = time.monotonic()
    done = 0
    task = bar.add_task(description, total=total)

    def advance(detail: str = "") -> None:
        nonlocal done, last_line
        done += 1
        now = time.monotonic()
        bar.update(task, completed=done, description=f"{description} {detail}".rstrip())
        if console.is_terminal:
            if now - started > SHOW_AFTER_SECONDS and not bar.live.is_started:
                bar.start()
        elif now - last_line > 10:
            last_line = now
            print(f"{description} {detail} {done}/{total}", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
