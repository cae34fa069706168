"""The command line: one file per command, listed here.

A command file holds a function `run` (its docstring is the help) and `EXAMPLES`. Only typer, rich and the light part of
trimtab are imported at the top of these files; torch and transformers come inside the functions, so that
`trimtab --help` and `trimtab list` answer at once.

Exit status: 0 done, 1 a bug in trimtab (with its traceback), 2 something the user can mend (one message on standard
error), 3 a claim that does not hold, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import typer

from trimtab.app.cli import (
    bench,
    claims,
    compare,
    compress,
    demo,
    describe,
    doctor,
    evaluate,
    export,
    fit,
    generate,
    list,
    modules,
    plan,
    train,
)
from trimtab.app.cli.output import complain
from trimtab.core.errors import TrimtabError

SECTIONS: dict[str, tuple[ModuleType, ...]] = {
    "See it work": (demo,),
    "Change a model": (compress, fit, export, train),
    "Use and measure a model": (generate, evaluate, compare, modules, plan),
    "Look things up": (list, describe, claims, bench, doctor),
}
EXAMPLES = (
    "trimtab demo",
    "trimtab list",
    "trimtab compress ref --method gptq --set bits=4 -o ref-gptq4",
    'trimtab generate ref-gptq4 -p "Once upon a time"',
    "trimtab compare ref --methods rtn,gptq --bits 3,4 -o comparison",
)
_ENVIRONMENT = (
    "Every option can be set in the environment: --bits of compare is TRIMTAB_COMPARE_BITS. "
    "TRIMTAB_DEBUG=1 shows the traceback of an error."
)


def _epilog(examples: Sequence[str], *more: str) -> str:
    shown = "\n".join(["\n[bold]Examples[/bold]", *(f"  {example}" for example in examples)])
    return "\n\n".join([shown, *more])


def _show_version(wanted: bool) -> None:
    if wanted:
        from trimtab import __version__

        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="trimtab",
    help="Make open language models smaller, faster, cheaper to adapt, and prove what each intervention cost.",
    epilog=_epilog(EXAMPLES, _ENVIRONMENT),
    context_settings={"auto_envvar_prefix": "TRIMTAB", "help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, allow_from_autoenv=False, help="Show the version."
        ),
    ] = False,
) -> None:
    pass


for _section, _members in SECTIONS.items():
    for _module in _members:
        _name = _module.__name__.rpartition(".")[2]
        app.command(_name, epilog=_epilog(_module.EXAMPLES), rich_help_panel=_section)(_module.run)


def _quiet_libraries() -> None:
    """Libraries read these when they are first imported; what the user has set stays."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status (see the top of this file)."""
    _quiet_libraries()
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="trimtab")
    except (TrimtabError, OSError) as error:  # an OSError is a full disk or a missing right, not a bug
        if os.environ.get("TRIMTAB_DEBUG", "") not in ("", "0"):
            raise
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
