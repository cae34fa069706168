"""`trimtab bench [NAME]`: speed of the kernels, and of decoding with a long context, beside other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from trimtab.app.cli.options import AsJson, Seed, split_names
from trimtab.app.cli.output import emit_json, say, show, wide_table
from trimtab.app.report import text
from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.evaluation.kv_decode import Setting

EXAMPLES = (
    "trimtab bench",
    "trimtab bench grid-matmul --json",
    "trimtab bench kv-decode --context 8192",
    "trimtab bench kv-decode --systems llama.cpp,transformers/quanto-4 --caches kivi-4,kivi-2",
)
KV_DECODE = "kv-decode"
_NOT_FIGURES = ("bench", "setting", "system")
_KV_FIGURES = (
    "decode_ms_median",
    "attention_ms_median",
    "decode_spread",
    "prefill_s_median",
    "kv_bytes",
    "peak_rss_bytes",
    "bandwidth_share",
    "parity",
)


def run(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One benchmark, kv-decode included; without it, the kernels'."),
    ] = None,
    context: Annotated[int, typer.Option(help="kv-decode: tokens of the prompt.")] = Setting.context,
    steps: Annotated[int, typer.Option(help="kv-decode: tokens decoded after it.")] = Setting.steps,
    layers: Annotated[int, typer.Option(help="kv-decode: layers of the random model.")] = Setting.layers,
    systems: Annotated[
        str | None,
        typer.Option(help="kv-decode: only these, by name or library (llama.cpp).", show_default="all installed"),
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            help="kv-decode: trimtab's caches, as METHOD-BITS.", show_default="kivi-4, kivi-2, gear-2 and exact"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="kv-decode: of each system.", show_default="all cores")] = None,
    seed: Seed = Setting.seed,
    as_json: AsJson = False,
) -> None:
    """Measure on this machine.

    A kernel is measured beside torch and beside the memory bandwidth, after its results were compared with the
    reference's. kv-decode measures decoding with a long context: trimtab's caches, transformers' and, where installed,
    other libraries', one after the other on the same random model, each in a process of its own.
    """
    from trimtab.kernels import bench

    if name is not None and name.replace("_", "-") == KV_DECODE:
        from trimtab.evaluation import kv_decode

        setting = Setting(context=context, steps=steps, layers=layers, seed=seed)
        if threads is not None and threads < 1:
            raise ConfigError(f"--threads must be at least 1, but is {threads}.")
        chosen = kv_decode.choose(
            None if systems is None else split_names(systems, "--systems"),
            None if caches is None else split_names(caches, "--caches"),
        )
        measured = kv_decode.run(chosen, setting, threads=threads, tell=say)
        emit_json(measured) if as_json else _show_kv_decode(measured)
        return
    if name is not None and name.replace("_", "-") not in bench.BENCHMARKS:
        raise ConfigError(f"unknown benchmark '{name}'. {did_you_mean(name, [*bench.BENCHMARKS, KV_DECODE])}")
    given = (context, steps, layers, systems, caches, threads, seed)
    if given != (Setting.context, Setting.steps, Setting.layers, None, None, None, Setting.seed):
        raise ConfigError(
            "--context, --steps, --layers, --systems, --caches, --threads and --seed belong to the benchmark "
            f"{KV_DECODE}. Run it with: trimtab bench {KV_DECODE}"
        )
    measured = bench.run(name)
    if as_json:
        emit_json(measured)
        return
    for title in dict.fromkeys(f"{entry['bench']}: {entry['setting']}" for entry in measured):
        own = [entry for entry in measured if f"{entry['bench']}: {entry['setting']}" == title]
        figures = dict.fromkeys(key for entry in own for key in entry if key not in _NOT_FIGURES)
        _show_table(title, list(figures), own)


def _show_kv_decode(measured: Sequence[Mapping[str, Any]]) -> None:
    done = [entry for entry in measured if "decode_ms_median" in entry]
    if done:
        first = done[0]
        title = f"{KV_DECODE}: context {first['context']:,}, {first['steps']} steps, {first['threads']} threads"
        _show_table(title, _KV_FIGURES, done)
    for entry in measured:
        for outcome in ("skipped", "error"):
            if outcome in entry:
                show(f"{entry['system']}: {outcome}: {entry[outcome]}")


def _show_table(title: str, figures: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    rows = [[str(entry["system"]), *(_cell(entry.get(figure)) for figure in figures)] for entry in entries]
    show(*wide_table(title, ["system", *(figure.replace("_", " ") for figure in figures)], rows))


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return text.number(value) if isinstance(value, float) else text.NOTHING if value is None else str(value)
