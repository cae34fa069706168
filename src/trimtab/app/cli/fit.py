"""`trimtab fit MODEL --cache NAME -o OUT`: what a cache learns from text, kept in a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trimtab.app.cli.compress import Sequences, Text
from trimtab.app.cli.options import (
    AsJson,
    Device,
    Force,
    Model,
    Seed,
    check_output,
    check_text,
    read_cache,
)
from trimtab.app.cli.options import CacheSettings as Settings
from trimtab.app.cli.output import emit_json, say
from trimtab.core.errors import ConfigError

EXAMPLES = (
    "trimtab fit ref --cache kvquant --cache-set bits=3 -o ref-kvquant",
    "trimtab fit ref --cache auto --text my-text.txt -o ref-auto",
    'trimtab generate ref-auto --cache auto --cache-set bits_per_element=2.5 -p "Once upon a time"',
)


def run(
    model: Model,
    cache: Annotated[str, typer.Option(metavar="NAME", help="A cache that learns from text.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the checkpoint.", show_default=False)],
    settings: Settings = None,
    text: Text = None,
    sequences: Sequences = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens per calibration sequence.")] = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit a cache to a model on calibration text, and save the model with what was learnt.

    Caches fit by themselves when they are first used; this keeps the result, and lets you choose the text.
    """
    from trimtab.models.checkpoint import MANIFEST

    method = read_cache(cache, settings)
    assert method is not None
    if not method.calibrated:
        raise ConfigError(f"the cache '{cache}' learns nothing from text; use it as it is: --cache {cache}.")
    check_text(text)
    check_output(out, force, holds=MANIFEST)

    import trimtab as tt
    from trimtab.cache import fit
    from trimtab.models import tokenizer_of
    from trimtab.models.calibration_set import CalibrationSet

    loaded = tt.load(model, device=device)
    calibration = CalibrationSet.from_text(text, tokenizer_of(loaded), sequences=sequences, length=length, seed=seed)
    started = time.perf_counter()
    learnt = fit(method, loaded, calibration)
    seconds = time.perf_counter() - started
    tt.save(loaded, out, force=force)
    size = sum(tensor.nbytes for tensor in learnt.values())
    if as_json:
        emit_json({"model": model, "cache": cache, "options": method.to_dict(), "bytes": size, "seconds": seconds})
    say(f"{cache}: {size:,} bytes learnt in {seconds:.1f} s; saved with the model in {out}")
