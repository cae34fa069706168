"""`trimtab train ref`: the shipped reference models, trained again."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.core.errors import ConfigError, DataError

EXAMPLES = ("trimtab train ref-mini --text my-prose/ -o my-ref-mini", "trimtab train ref --text my-prose/ -o my-ref")
_TRAINER = "trimtab.training.reference"


class Which(str, Enum):
    ref = "ref"
    ref_mini = "ref-mini"


def run(
    model: Annotated[Which, typer.Argument(help="The reference model to train.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Directory of UTF-8 .txt files: the prose.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.", show_default=False)],
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output directory.")] = True,
) -> None:
    """Train a reference model from scratch, on your prose and the generated small world. Resumable; takes hours."""
    if not text.is_dir():
        raise DataError(f"--text {text} is not a directory. Give one that holds UTF-8 .txt files.")
    if importlib.util.find_spec(_TRAINER) is None:
        raise ConfigError("this installation holds no training code; install trimtab from its repository.")
    command = [sys.executable, "-m", _TRAINER, model.value, "--text", str(text), "-o", str(out)]
    if not resume:
        command.append("--no-resume")
    raise typer.Exit(subprocess.run(command, check=False).returncode)
