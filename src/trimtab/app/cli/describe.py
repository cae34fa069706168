"""`trimtab describe METHOD`: what it does, its options, its paper."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Annotated, Any

import typer

from trimtab.app.cli.options import AsJson
from trimtab.app.cli.output import emit_json, show, table
from trimtab.core.registry import method_class, method_info

EXAMPLES = ("trimtab describe gptq", "trimtab describe rtn --json")


def option_docs(cls: type) -> dict[str, str]:
    """Field name -> text, from the `name   text` lines of the class docstrings, bases included."""
    found: dict[str, str] = {}
    fields = {f.name for f in dataclasses.fields(cls)}
    for owner in reversed(cls.__mro__):
        name = None
        for line in inspect.cleandoc(owner.__dict__.get("__doc__") or "").splitlines():
            start = re.match(r"((?:\w+,\s*)*\w+)(?:\s{2,}|:\s+)(\S.*)", line)
            names = [n.strip() for n in start.group(1).split(",")] if start else []
            if start and set(names) <= fields:
                name = names
                found |= dict.fromkeys(names, start.group(2))
            elif name and line.startswith("  ") and line.strip():
                found |= {n: f"{found[n]} {line.strip()}" for n in name}
            else:
                name = None
    return found


def _type_name(hint: Any) -> str:
    """A type as a user reads it: the values to choose from, or the kind of value."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "list of " + _type_name(typing.get_args(hint)[0])
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def options_of(cls: type) -> list[dict[str, Any]]:
    """Name, type, default and meaning of each option of a method; `default` is missing where one must be given."""
    docs, hints = option_docs(cls), typing.get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        option = {"name": field.name, "type": _type_name(hints[field.name]), "help": docs.get(field.name, "")}
        if field.default is not dataclasses.MISSING:
            option["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            option["default"] = field.default_factory()
        options.append(option)
    return options


def _example(name: str, room: str) -> str:
    commands = {
        "weights": f"trimtab compress ref --method {name} -o ref-{name}",
        "cache": f'trimtab generate ref -p "Once upon a time" --cache {name}',
    }
    return f"Try it: {commands[room]}" if room in commands else ""


def run(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name from trimtab list.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Describe one method: what it does, when it fails, options, paper."""
    info = method_info(method)
    cls = method_class(info.name)
    options = options_of(cls)
    module_text = inspect.cleandoc(inspect.getmodule(cls).__doc__ or "")
    paragraphs = [p for p in re.split(r"\n\s*\n", module_text)[1:] if not p.startswith("Paper:")]
    if as_json:
        listed = {"name": info.name, "room": info.room, "summary": info.summary, "paper": info.paper}
        emit_json({**listed, "description": "\n\n".join(paragraphs), "options": options})
        return
    rows = [(o["name"], o["type"], repr(o["default"]) if "default" in o else "required", o["help"]) for o in options]
    show(f"[bold]{info.name}[/bold] ({info.room}): {info.summary}", "")
    for paragraph in paragraphs:
        print(paragraph + "\n")
    show(
        table("Options", ("option", "type", "default", "meaning"), rows),
        f"Paper: {info.paper}",
        "",
        _example(info.name, info.room),
    )
