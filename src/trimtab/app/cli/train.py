"""`trimtab train ref`: the shipped reference models, trained again."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.app.cli.options import Device
from trimtab.core.errors import DataError

EXAMPLES = ("trimtab train ref-mini --text my-prose/ -o my-ref-mini", "trimtab train ref --text my-prose/ -o my-ref")


class Which(str, Enum):
    """The models that can be trained again."""

    ref = "ref"
    ref_mini = "ref-mini"


def run(
    model: Annotated[Which, typer.Argument(help="The reference model to train.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Directory of books: UTF-8 files NAME.txt.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run.", show_default=False)],
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile: slower to start.")] = True,
) -> None:
    """Train a reference model from scratch.

    On your prose and the generated small world; hours on a CPU. Started again with the same options it continues where
    it was stopped. The model is then in OUT/model.
    """
    if not text.is_dir():
        raise DataError(f"--text {text} is not a directory. Give one that holds UTF-8 .txt files.")
    command = [sys.executable, "-m", "trimtab.training.reference"]
    command += ["--model", model.value, "--text", str(text), "--out", str(out)]
    command += [] if device is None else ["--device", device]
    command += [] if compiled else ["--no-compile"]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
