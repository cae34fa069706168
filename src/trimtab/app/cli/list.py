"""`trimtab list`: the methods there are, from file names and docstrings."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, table
from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.registry import METHOD_ROOMS, methods

EXAMPLES = ("trimtab list", "trimtab list --room weights --json")


def run(
    room: Annotated[str | None, typer.Option(help=f"Only this room: {', '.join(METHOD_ROOMS)}.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: name, room, what it does, its paper."""
    if room is not None and room not in METHOD_ROOMS:
        raise ConfigError(f"unknown room '{room}'. {did_you_mean(room, METHOD_ROOMS)}")
    found = [info for info in methods().values() if room in (None, info.room)]
    if as_json:
        emit_json([{"name": m.name, "room": m.room, "summary": m.summary, "paper": m.paper} for m in found])
        return
    rows = [(m.name, m.room, m.summary, m.paper) for m in found]
    show(table("", ("method", "room", "what it does", "paper"), rows), "More about one: trimtab describe METHOD")
