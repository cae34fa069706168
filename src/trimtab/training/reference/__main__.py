"""Train a reference model: ``python -m trimtab.training.reference --text DIR --out DIR``.

Started again with the same arguments it continues where it was stopped. At the end DIR/model is a
Hugging Face directory with the training log, the loss curve and the data manifest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from trimtab.core.errors import DataError, TrimtabError
from trimtab.training.reference.data import Rows, tokenize_prose, training_books
from trimtab.training.reference.loop import Run
from trimtab.training.reference.model import MODELS, build
from trimtab.training.reference.publish import publish
from trimtab.training.reference.stages import SEED, STAGES
from trimtab.training.reference.texts import HELD_OUT
from trimtab.training.reference.tokenizer import train_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.training.reference", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of books (*.txt)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--model", choices=sorted(MODELS), default="ref")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="slower, but starts at once")
    parsed = parser.parse_args(arguments)
    try:
        train(parsed.text, parsed.out, parsed.model, parsed.device, not parsed.no_compile)
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(text: Path, out: Path, name: str, device: str, compiled: bool) -> None:
    """Train one model from a folder of books and publish it in ``out/model``."""
    books = training_books(text, HELD_OUT)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tokenizer = _tokenizer(books, out / "tokenizer")
    prose = tokenize_prose(tokenizer, books)
    longest = max(stage.tokens for stage in STAGES[name])
    if len(prose) <= longest:
        raise DataError(f"the books in {text} have {len(prose)} tokens; more than {longest} are needed.")
    run = Run(
        build(name, SEED),
        STAGES[name],
        Rows(tokenizer, prose),
        out,
        device=device,
        compiled=compiled,
    )
    run.train()
    publish(run.model, tokenizer, out, text)


def _tokenizer(books: Sequence[Path], saved: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of this run: learned once, then read."""
    if not (saved / "tokenizer.json").exists():
        train_tokenizer(list(books)).save_pretrained(saved)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(saved)
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
