"""The run: the model once, one process per system, one entry per system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import NumericsError
from trimtab.evaluation.kv_decode.llama_cpp_session import GGUF_FILE
from trimtab.evaluation.kv_decode.measure import Benchmark, Setting
from trimtab.evaluation.kv_decode.systems import System
from trimtab.kernels.bandwidth import read_bandwidth_gbps
from trimtab.models import random_model, save
from trimtab.models.exports.base import Source
from trimtab.models.exports.gguf import Gguf

_LIMIT_SECONDS = 3600


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One entry per system: {"bench", "system", "context", ...} with the figures of `measure`, the peak resident set,
    and the share of the memory bandwidth that attention's reading of the cache reaches.

    threads   for every system; None: as many as this process may use
    tell      called with a line of progress per system

    A system that is not installed has "skipped" instead, with the reason; one that fails has "error", and the others
    go on.
    """

    def make(folder: Path, chosen: Sequence[System]) -> None:
        make_model(folder, setting, gguf=any(system.library == "llama.cpp" for system in chosen))

    return run_systems(systems, setting, make, bandwidth_figures, threads=threads, tell=tell)


def run_systems(
    systems: Sequence[System],
    setting: Setting,
    make: Callable[[Path, Sequence[System]], None],
    finish: Callable[[dict[str, Any], float], dict[str, Any]],
    *,
    threads: int | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The run that all benchmarks beside other libraries share, as `run` describes it.

    make     called with an empty folder and the systems that are installed, writes what their openers read
    finish   figures of a system, GB/s of reading memory just before -> what to add; may raise NumericsError, which
             leaves the error in place of the figures
    """
    count = threads or len(os.sched_getaffinity(0))
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=f"trimtab-{setting.bench}-") as folder:
        absent = {system.name: system.absent() for system in systems}
        if chosen := [system for system in systems if not absent[system.name]]:
            tell(f"making the model: {setting.layers} layers, {setting.hidden} wide, seed {setting.seed}")
            make(Path(folder), chosen)
        for number, system in enumerate(systems, 1):
            entry: dict[str, Any] = {"bench": setting.bench, "system": system.name, "context": setting.context}
            if reason := absent[system.name]:
                tell(f"{number}/{len(systems)} {system.name}: skipped: {reason}")
                entries.append({**entry, "skipped": reason})
                continue
            tell(f"{number}/{len(systems)} {system.name}")
            bandwidth = read_bandwidth_gbps(count)
            figures = measure_system(system, Path(folder), setting, count)
            if "error" not in figures:
                try:
                    figures |= finish(figures, bandwidth)
                except NumericsError as error:
                    figures = {"error": str(error)}
            if "error" in figures:
                tell(f"{system.name} failed: {figures['error']}")
            entries.append({**entry, "steps": setting.steps, "threads": count, **figures})
    return entries


def make_model(directory: Path, setting: Setting, *, gguf: bool, gguf_type: str = "bf16") -> None:
    """Write the random model as a Hugging Face directory, and into it for llama.cpp if wanted: the same weights.

    llama.cpp decodes with bfloat16 weights as fast as with float16 and reads prompts faster where the processor
    multiplies bfloat16 itself; both are 16 bits.
    """
    model = random_model(
        "llama",
        setting.seed,
        dtype=torch.bfloat16,
        hidden_size=setting.hidden,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.query_heads,
        num_key_value_heads=setting.kv_heads,
        head_dim=setting.head_dim,
        vocab_size=setting.vocabulary,
        max_position_embeddings=setting.positions,
    )
    save(model, directory, force=True)
    if gguf:
        # not `models.export`, which takes compressed models
        file = directory / GGUF_FILE
        Gguf.from_options({"dense": gguf_type, "tokenizer": "none"}).write(Source.of(model), file, file)


def measure_system(system: System, model: Path, setting: Benchmark, threads: int) -> dict[str, Any]:
    """Measure in a process of its own; {"error": reason} if it fails, is killed or does not end within an hour."""
    job = {
        "package": setting.package,
        "opener": system.opener,
        "options": dict(system.options),
        "model": str(model),
        "setting": asdict(setting),
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "trimtab.evaluation.kv_decode.child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_LIMIT_SECONDS} seconds"}
    if done.returncode == 0:
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = said[-1] if said else "it said nothing"
    if done.returncode < 0:
        return {"error": f"killed by {signal.Signals(-done.returncode).name}; last on standard error: {last}"}
    return {"error": last}


def bandwidth_figures(figures: dict[str, Any], bandwidth_gbps: float) -> dict[str, float]:
    """How fast attention reads what the cache holds beyond the short context, if each byte is read once per step."""
    read = (figures["kv_bytes"] - figures["short_kv_bytes"]) / 1e9
    seconds = figures["attention_ms_median"] / 1e3
    gbps = read / seconds if seconds > 0 else float("nan")
    return {"read_gbps_median": gbps, "bandwidth_gbps": bandwidth_gbps, "bandwidth_share": gbps / bandwidth_gbps}
