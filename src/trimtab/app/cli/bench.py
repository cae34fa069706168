"""`trimtab bench [NAME]`: speed of the kernels, and of whole models and layers beside other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from trimtab.app.cli.options import AsJson, split_names
from trimtab.app.cli.output import emit_json, say, show, wide_table
from trimtab.app.report import text
from trimtab.core.errors import ConfigError, did_you_mean

EXAMPLES = (
    "trimtab bench",
    "trimtab bench grid-matmul --json",
    "trimtab bench decode --systems trimtab,llama.cpp/q4_0",
    "trimtab bench decode --cache kivi-4 --context 8192",
    "trimtab bench linear --systems trimtab/grid-4,torch",
    "trimtab bench compress --model ref",
    "trimtab bench decoding --depth 4",
    "trimtab bench kv-decode --context 8192",
    "trimtab bench kv-decode --systems llama.cpp,transformers/quanto-4 --caches kivi-4,kivi-2",
)
_NOT_FIGURES = ("bench", "setting", "system")


@dataclass(frozen=True)
class _Beside:
    """A benchmark beside other libraries.

    run       chosen names, caches, options of its Setting, threads -> entries
    options   that it takes beside --systems, --threads and --seed
    figures   that its table shows; the first is there exactly where a system was measured
    """

    run: Callable[..., list[dict[str, Any]]]
    options: tuple[str, ...]
    figures: tuple[str, ...]


def _kv_decode(systems: Sequence[str] | None, threads: int | None, caches: str | None = None, **setting: Any) -> Any:
    from trimtab.evaluation import kv_decode

    chosen = kv_decode.choose(systems, None if caches is None else split_names(caches, "--caches"))
    return kv_decode.run(chosen, kv_decode.Setting(**setting), threads=threads, tell=say)


def _decode(systems: Sequence[str] | None, threads: int | None, cache: str | None = None, **setting: Any) -> Any:
    from trimtab.evaluation import weight_decode

    chosen = weight_decode.choose(systems, cache)
    return weight_decode.run(chosen, weight_decode.Setting(**setting), threads=threads, tell=say)


def _linear(systems: Sequence[str] | None, threads: int | None, **setting: Any) -> Any:
    from trimtab.evaluation import linear_speed

    return linear_speed.run(linear_speed.choose(systems), linear_speed.Setting(**setting), threads=threads, tell=say)


def _compress(systems: Sequence[str] | None, threads: int | None, **setting: Any) -> Any:
    from trimtab.evaluation import compress_time

    return compress_time.run(compress_time.choose(systems), compress_time.Setting(**setting), threads=threads, tell=say)


def _decoding(systems: Sequence[str] | None, threads: int | None, **setting: Any) -> Any:
    from trimtab.evaluation import decoding_speed

    return decoding_speed.run(
        decoding_speed.choose(systems), decoding_speed.Setting(**setting), threads=threads, tell=say
    )


_MODEL = ("context", "steps", "layers")
_STEP = ("decode_ms_median", "decode_spread", "prefill_s_median")
_BESIDE = {
    "kv-decode": _Beside(
        _kv_decode,
        (*_MODEL, "caches"),
        (*_STEP, "attention_ms_median", "kv_bytes", "peak_rss_bytes", "bandwidth_share", "parity"),
    ),
    "decode": _Beside(
        _decode,
        (*_MODEL, "cache"),
        (*_STEP, "weight_bytes", "bandwidth_share", "peak_rss_bytes", "parity", "agreement"),
    ),
    "linear": _Beside(
        _linear,
        (),
        ("decode_ms_median", "shape", "rows", "weight_bytes", "bandwidth_share", "distance", "parity"),
    ),
    "decoding": _Beside(
        _decoding,
        ("steps", "depth"),
        ("tokens_per_s_median", "spread", "tokens_per_target_forward", "accepted_by_depth", "same_text"),
    ),
    "compress": _Beside(
        _compress,
        ("model", "sequences"),
        ("compress_s", "peak_rss_bytes", "loaded_rss_bytes", "weight_error"),
    ),
}


def run(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help=f"One benchmark, {', '.join(_BESIDE)} included; without it, the kernels'.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="decode, kv-decode: tokens held while steps are timed.", show_default="short, 8192"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="decode, kv-decode, decoding: tokens decoded after it.", show_default="64, 128, 96"),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="decoding: tokens drafted per round.", show_default="5")] = None,
    layers: Annotated[
        int | None, typer.Option(help="decode, kv-decode: layers of the random model.", show_default="8, 4")
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            help="Beside other libraries: only these, by name or library (llama.cpp).", show_default="all installed"
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="decode: trimtab's systems with this cache, as METHOD-BITS, beside llama.cpp's types of KV cache.",
            show_default="16 bits",
        ),
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            help="kv-decode: trimtab's caches, as METHOD-BITS.", show_default="kivi-4, kivi-2, gear-2 and exact"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="compress: ref, or random, of 369 million weights.", show_default="random")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="compress: calibration sequences of 512 tokens.", show_default="32")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Beside other libraries: of each system.", show_default="all cores")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Beside other libraries: of all that is drawn at random.", show_default="0")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure on this machine.

    A kernel is measured beside torch and beside the memory bandwidth, after its results were compared with the
    reference's. The others measure one system after the other on the same random weights, each in a process of its own:
    trimtab, torch, and other libraries where they are installed. decode: a whole step with compressed weights. linear:
    single layers. kv-decode: decoding with a long context. decoding: with drafts. compress: time and memory of
    compressing.
    """
    from trimtab.kernels import bench

    given = {
        "context": context,
        "steps": steps,
        "depth": depth,
        "layers": layers,
        "systems": systems,
        "cache": cache,
        "caches": caches,
        "model": model,
        "sequences": sequences,
        "threads": threads,
        "seed": seed,
    }
    options = {option: value for option, value in given.items() if value is not None}
    key = None if name is None else name.replace("_", "-")
    if key is not None and key not in (*bench.BENCHMARKS, *_BESIDE):
        raise ConfigError(f"unknown benchmark '{name}'. {did_you_mean(key, [*bench.BENCHMARKS, *_BESIDE])}")
    if key in _BESIDE:
        measured = _run_beside(str(key), options)
        emit_json(measured) if as_json else _show_beside(str(key), measured)
        return
    _refuse_others(options, (), name)
    measured = bench.run(name)
    if as_json:
        emit_json(measured)
        return
    for title in dict.fromkeys(f"{entry['bench']}: {entry['setting']}" for entry in measured):
        own = [entry for entry in measured if f"{entry['bench']}: {entry['setting']}" == title]
        figures = dict.fromkeys(key for entry in own for key in entry if key not in _NOT_FIGURES)
        _show_table(title, list(figures), own)


def _run_beside(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    _refuse_others(options, (*_BESIDE[name].options, "systems", "threads", "seed"), name)
    threads, systems = options.pop("threads", None), options.pop("systems", None)
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be at least 1, but is {threads}.")
    return _BESIDE[name].run(None if systems is None else split_names(systems, "--systems"), threads, **options)


def _refuse_others(options: Mapping[str, Any], known: Sequence[str], name: str | None) -> None:
    """Raise ConfigError for an option of another benchmark, naming those that have it."""
    for option in options:
        if option not in known:
            having = [other for other, beside in _BESIDE.items() if option in beside.options] or list(_BESIDE)
            raise ConfigError(
                f"--{option} is no option of {f'the benchmark {name}' if name else 'the kernel benchmarks'}. It "
                f"belongs to {' and '.join(having)}; run, for example: trimtab bench {having[0]} --{option} ..."
            )


def _show_beside(name: str, measured: Sequence[Mapping[str, Any]]) -> None:
    figures = _BESIDE[name].figures
    done = [entry for entry in measured if figures[0] in entry]
    if done:
        what = [f"{entry:,} {unit}" for unit in ("steps", "threads") if isinstance(entry := done[0].get(unit), int)]
        if "context" in done[0]:
            what.insert(0, f"context {done[0]['context']:,}")
        _show_table(f"{name}: {', '.join(what)}", figures, done)
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
