"""The run: the model once, one process per system, one entry per system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.evaluation.beside.base import System
from trimtab.evaluation.beside.run import read_speed, run_systems
from trimtab.evaluation.kv_decode.llama_cpp_session import GGUF_FILE
from trimtab.evaluation.kv_decode.measure import Setting
from trimtab.models import random_model, save
from trimtab.models.exports.base import Source
from trimtab.models.exports.gguf import Gguf


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run_systems`: one entry per system with the figures of `measure`, the peak resident set, and the share of the
    memory bandwidth that attention reaches if a step reads once what the cache holds beyond the short context."""

    def make(folder: Path, chosen: Sequence[System]) -> None:
        make_model(folder, setting, gguf=any(system.library == "llama.cpp" for system in chosen), tell=tell)

    def finish(figures: dict[str, Any], bandwidth_gbps: float) -> list[dict[str, Any]]:
        read = figures["kv_bytes"] - figures["short_kv_bytes"]
        return [figures | read_speed(read, figures["attention_ms_median"], bandwidth_gbps)]

    return run_systems(systems, setting, make, finish, threads=threads, tell=tell)


def make_model(
    directory: Path,
    setting: Setting,
    *,
    gguf: bool,
    gguf_type: str = "bf16",
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the random model as a Hugging Face directory, and into it for llama.cpp if wanted: the same weights.

    llama.cpp decodes with bfloat16 weights as fast as with float16 and reads prompts faster where the processor
    multiplies bfloat16 itself; both are 16 bits.
    """
    tell(f"making the model: {setting.layers} layers, {setting.hidden} wide, seed {setting.seed}")
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
