"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.core.errors import ConfigError, OutputError, did_you_mean
from trimtab.core.files import read_user_text, refuse_occupied

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod
    from trimtab.decoding.base import DecodingMethod

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="ref or ref-mini (shipped), a directory, a trimtab checkpoint or a Hugging Face id.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.", show_default="the CPU")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in the output directory.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method; may be given several times."),
]


Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="NAME",
        help="Keep keys and values by this method: see trimtab list --room cache.",
        show_default=False,
    ),
]
CacheSettings = Annotated[
    list[str] | None,
    typer.Option("--cache-set", metavar="OPTION=VALUE", help="An option of the cache; may be given several times."),
]


Decoding = Annotated[
    str | None,
    typer.Option(
        "--decoding",
        metavar="NAME[,NAME]",
        help="Decode by these methods, which supply different parts: see trimtab list --room decoding.",
        show_default=False,
    ),
]
DecodingSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--decoding-set",
        metavar="OPTION=VALUE[,...]",
        help="An option of the decoding, or of one of them as NAME.OPTION=VALUE; may be given several times.",
    ),
]


def read_decoding(names: str | None, pairs: Iterable[str] | None) -> list[DecodingMethod]:
    """The methods of --decoding and --decoding-set, none without. Raises ConfigError before a model is loaded."""
    if names is None:
        if pairs:
            raise ConfigError(
                f"--decoding-set {next(iter(pairs))} is an option of a decoding; name it with --decoding."
            )
        return []
    return decoding_methods(split_names(names, "--decoding"), pairs)


def decoding_methods(names: Sequence[str], pairs: Iterable[str] | None) -> list[DecodingMethod]:
    """Methods of the decoding room with their settings: `option` goes to all that have it, `method.option` to one.

    Raises ConfigError for a method that is none, and for an option that no method has.
    """
    from trimtab.app.comparison import check_prefixes
    from trimtab.core.registry import method_class, method_info

    infos = [method_info(name) for name in names]
    for info in infos:
        if info.room != "decoding":
            raise ConfigError(f"'{info.name}' is a method of the room {info.room}; see trimtab list --room decoding.")
    settings = read_settings([part for pair in pairs or () for part in _split_settings(pair)], "--decoding-set")
    check_prefixes([info.name for info in infos], settings)
    classes: list[Any] = [method_class(info.name) for info in infos]
    options = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    if unknown := [key for key in settings if "." not in key and not any(key in own for own in options)]:
        raise ConfigError(
            f"--decoding-set {unknown[0]}: no such option of {' or '.join(info.name for info in infos)}. "
            f"{did_you_mean(unknown[0], set().union(*options))}"
        )
    methods = []
    for info, cls, own in zip(infos, classes, options, strict=True):
        chosen = {key: text for key, text in settings.items() if key in own}
        chosen |= {key.partition(".")[2]: text for key, text in settings.items() if key.startswith(f"{info.name}.")}
        methods.append(cls.from_options(typed_settings(cls, chosen)))
    return methods


def _split_settings(text: str) -> list[str]:
    """`k=4,depth=5` as its settings; a comma that no OPTION= follows is part of the value before."""
    return re.split(r",(?=\s*[A-Za-z_][\w.-]*=)", text)


def read_cache(name: str | None, pairs: Iterable[str] | None) -> CacheMethod | None:
    """The cache method of --cache and --cache-set, None without. Raises ConfigError before a model is loaded."""
    settings = read_settings(pairs, "--cache-set")
    if name is None:
        if settings:
            raise ConfigError(f"--cache-set {next(iter(settings))} is an option of a cache; name it with --cache.")
        return None
    from trimtab.evaluation.caches.named import cache_class

    cls = cache_class(name)
    return cls.from_options(typed_settings(cls, settings))


def split_names(text: str, what: str) -> list[str]:
    """Comma-separated names. Raises ConfigError if there is none or one comes twice."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"{what} is empty. Give names separated by commas.")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{what} names {', '.join(doubled)} more than once.")
    return names


def split_numbers(text: str, what: str) -> list[int]:
    """Comma-separated whole numbers. Raises ConfigError naming the one that is none."""
    numbers = []
    for part in split_names(text, what):
        try:
            numbers.append(int(part))
        except ValueError:
            raise ConfigError(f"{what} holds '{part}', which is not a whole number (write {what} 2,3,4).") from None
    return numbers


def read_settings(pairs: Iterable[str] | None, option: str = "--set") -> dict[str, str]:
    """`["bits=4", ...]` as a mapping. Raises ConfigError on a pair without '=' and on an option given twice."""
    settings: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"{option} {pair!r} is not OPTION=VALUE, such as {option} bits=4.")
        if name in settings:
            raise ConfigError(f"{option} gives '{name}' twice: {settings[name]} and {value}.")
        settings[name] = value.strip()
    return settings


def typed_settings(method: type, settings: dict[str, str]) -> dict[str, Any]:
    """Settings whose text needs splitting before the method's own reading: lists at commas, `none` where allowed."""
    hints = typing.get_type_hints(method)
    typed: dict[str, Any] = {}
    for name, text in settings.items():
        hint = hints.get(name)
        choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        words = [word for choice in choices if typing.get_origin(choice) is typing.Literal for word in choice.__args__]
        if type(None) in choices and text.lower() in ("none", "null"):
            typed[name] = None
        elif text in words:
            typed[name] = text
        elif any(typing.get_origin(choice) in (tuple, list) for choice in choices):
            typed[name] = tuple(part.strip() for part in text.split(",") if part.strip())
        else:
            typed[name] = text
    return typed


def check_text(file: Path | None) -> None:
    """Raise DataError if a text file was given that is missing, empty or not UTF-8: before a model is loaded."""
    if file is not None:
        read_user_text(file)


def check_output(path: Path, force: bool, *, holds: str) -> None:
    """Raise OutputError, before any work, if the output cannot be written.

    With `force` only a directory that has the file `holds` is replaced, so that a mistyped name costs no other files.
    """
    refuse_occupied(path, force)
    if path.is_dir() and any(path.iterdir()) and not (path / holds).exists():
        raise OutputError(
            f"output directory {path} holds other files and no {holds}; --force only replaces what trimtab has written."
        )
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"output {path} cannot be written: {existing} is not a directory that you may write to.")
