"""Speed of the kernels beside torch and beside the machine's memory bandwidth: `trimtab bench`.

    python -m trimtab.kernels.bench --out benchmarks/results     measure all and keep the results

A benchmark first compares every system with the reference on the very inputs it is about to time, and raises instead of
printing a speed when the error is above the bound of the parity tests.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError, did_you_mean
from trimtab.core.files import write_text_atomically
from trimtab.core.run_record import machine, versions
from trimtab.kernels.bandwidth import read_bandwidth_gbps
from trimtab.kernels.grid_matmul import GridWeight, grid_matmul_many
from trimtab.kernels.grid_matmul.prepared import prepared_grids
from trimtab.kernels.grid_matmul.reference import grid_matmul_reference
from trimtab.kernels.half_linear import half_linear
from trimtab.kernels.half_linear.reference import half_linear_reference
from trimtab.kernels.packing import packed_bytes

RMS_BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS error against the float32 reference that every backend stays below; the rounding of the result in x's
dtype takes most of it. Parity tests use the same numbers."""

_TRAFFIC_BYTES = 1 << 28  # distinct weight bytes read between two uses of one matrix: no cache holds them
_CHECKED_ROWS = 64  # output rows whose results are compared; the kernels treat all rows alike
_TURNS = 30  # timed calls of each system
_TORCH = "torch/bf16-linear"

Calls = tuple[list[Callable[[], object]], int]
"""One call per distinct matrix, and the bytes of the weights of one call."""


@dataclass(frozen=True)
class Shape:
    """A product to time: weights [out, in], `batch` rows of x in bfloat16; packed weights in groups of `group_size`."""

    out_features: int
    in_features: int
    batch: int
    group_size: int = 64
    traffic_bytes: int = _TRAFFIC_BYTES

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}, batch {self.batch}"


@dataclass(frozen=True)
class Form:
    """What codes mean: `kind` is "symmetric", "zeros" (float16 zero points) or "levels" (one table for all rows)."""

    bits: int
    kind: str = "symmetric"

    def __str__(self) -> str:
        return f"grid-{self.bits}" + ("" if self.kind == "symmetric" else f"-{self.kind}")

    def weight(self, shape: Shape, seed: int) -> GridWeight:
        generator = torch.Generator().manual_seed(seed)
        rows, columns, size = shape.out_features, shape.in_features, shape.group_size
        groups = 1 if size == -1 else columns // size
        length = packed_bytes(columns, self.bits)
        packed = torch.randint(0, 256, (rows, length), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(rows, groups, generator=generator) + 0.5).half()
        zeros = (torch.rand(rows, groups, generator=generator) * 2**self.bits).half() if self.kind == "zeros" else None
        levels = torch.randn(2**self.bits, generator=generator) if self.kind == "levels" else None
        return GridWeight(packed, scales, zeros, self.bits, size, columns, levels)


PLAIN = tuple(Form(bits) for bits in (2, 3, 4, 8))
FORMS = (*PLAIN, *(Form(bits, "levels") for bits in (2, 3, 4)), Form(4, "zeros"))
SHAPES = tuple(Shape(4096, 11008, batch) for batch in (1, 8, 16, 32, 64))
GROUPED_SHAPES = tuple(Shape(4096, 11008, 1, size) for size in (32, 128, -1))
PREFILL_SHAPES = (Shape(2048, 5632, 512), Shape(5632, 2048, 512))
MANY_SHAPES = (
    (Shape(2048, 2048, 1), Shape(256, 2048, 1), Shape(256, 2048, 1)),  # query, key, value
    (Shape(5632, 2048, 1), Shape(5632, 2048, 1)),  # gate, up
)
HALF_SHAPES = tuple(Shape(*size, batch) for size in ((4096, 11008), (1024, 1024), (2816, 1024)) for batch in (1, 8))


def grid_matmul_bench(shapes: Sequence[Shape] = SHAPES, forms: Sequence[Form] = PLAIN) -> list[dict[str, Any]]:
    """Packed weights of each form, and torch's bfloat16 linear on the same shapes."""
    return _grid_bench("grid-matmul", shapes, forms)


def grid_forms_bench() -> list[dict[str, Any]]:
    """As grid-matmul at batch 1, with levels and zero points, and with other groups."""
    return _grid_bench("grid-forms", [SHAPES[0], *GROUPED_SHAPES], FORMS)


def grid_prefill_bench(shapes: Sequence[Shape] = PREFILL_SHAPES, forms: Sequence[Form] = FORMS) -> list[dict[str, Any]]:
    """As grid-matmul with the rows of a prompt, where arithmetic is the limit."""
    return _grid_bench("grid-prefill", shapes, forms)


def _grid_bench(bench: str, shapes: Sequence[Shape], forms: Sequence[Form]) -> list[dict[str, Any]]:
    entries = []
    for shape in shapes:
        x = _inputs(shape)
        systems = {f"trimtab/{form}": _grid_calls([shape], form, x) for form in forms}
        systems[_TORCH] = _dense_calls(_dense_weights(shape), x, torch.nn.functional.linear, _TORCH)
        entries += _time(bench, f"{shape}, group {shape.group_size}", systems)
    return entries


def grid_many_bench(
    sets: Sequence[Sequence[Shape]] = MANY_SHAPES, forms: Sequence[Form] = PLAIN
) -> list[dict[str, Any]]:
    """Weights of one input: multiplied one by one, in one call, and in one prepared call."""
    entries = []
    for shapes in sets:
        x = _inputs(shapes[0])
        systems: dict[str, Calls] = {}
        for form in forms:
            for how in ("separate", "one-call", "prepared"):
                systems[f"trimtab/{form}-{how}"] = _grid_calls(shapes, form, x, how)
        whole = replace(shapes[0], out_features=sum(shape.out_features for shape in shapes))
        systems[_TORCH] = _dense_calls(_dense_weights(whole), x, torch.nn.functional.linear, _TORCH)
        entries += _time("grid-many", " + ".join(map(str, shapes)), systems)
    return entries


def half_linear_bench(shapes: Sequence[Shape] = HALF_SHAPES) -> list[dict[str, Any]]:
    """Dense bfloat16 weights, multiplied by half_linear and by torch's linear."""
    entries = []
    for shape in shapes:
        x, weights = _inputs(shape), _dense_weights(shape)
        linears = {"trimtab/half-linear": half_linear, _TORCH: torch.nn.functional.linear}
        systems = {system: _dense_calls(weights, x, linear, system) for system, linear in linears.items()}
        entries += _time("half-linear", str(shape), systems)
    return entries


def _inputs(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()


def _grid_calls(shapes: Sequence[Shape], form: Form, x: Tensor, how: str = "one-call") -> Calls:
    """Products of x with weights of all shapes. Raises NumericsError if parity is red."""
    calls: list[Callable[[], object]] = []
    traffic = nbytes = 0
    while traffic < shapes[0].traffic_bytes or len(calls) < 2:
        weights = [form.weight(shape, 100 * len(calls) + i) for i, shape in enumerate(shapes)]
        call = _grid_call(weights, x, how)
        if not calls:
            nbytes = sum(tensor.nbytes for weight in weights for tensor in weight.tensors().values())
            for weight, found in zip(weights, call(), strict=True):
                checked = replace(weight, packed=weight.packed[:_CHECKED_ROWS], scales=weight.scales[:_CHECKED_ROWS])
                if weight.zeros is not None:
                    checked = replace(checked, zeros=weight.zeros[:_CHECKED_ROWS])
                expected = grid_matmul_reference(x.float(), [checked])[0]
                _demand_parity(found[:, :_CHECKED_ROWS], expected, str(form))
        calls.append(call)
        traffic += nbytes
    return calls, nbytes


def _grid_call(weights: Sequence[GridWeight], x: Tensor, how: str) -> Callable[[], Sequence[Tensor]]:
    if how == "prepared":
        prepared = prepared_grids(weights)
        return lambda: prepared.run(x)
    if how == "separate":
        return lambda: [grid_matmul_many(x, [weight])[0] for weight in weights]
    return lambda: grid_matmul_many(x, weights)


def _dense_weights(shape: Shape) -> list[Tensor]:
    """Distinct bfloat16 matrices [out, in], as many as the traffic takes."""
    nbytes = 2 * shape.out_features * shape.in_features
    return [
        torch.empty(shape.out_features, shape.in_features, dtype=torch.bfloat16).uniform_(
            -1, 1, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(max(2, -(-shape.traffic_bytes // nbytes)))
    ]


def _dense_calls(
    weights: Sequence[Tensor], x: Tensor, linear: Callable[[Tensor, Tensor], Tensor], system: str
) -> Calls:
    part = slice(0, _CHECKED_ROWS)
    expected = half_linear_reference(x.float(), weights[0][part].float())
    _demand_parity(linear(x, weights[0])[:, part], expected, system)
    return [lambda w=weight: linear(x, w) for weight in weights], weights[0].nbytes  # type: ignore[misc]


def _demand_parity(found: Tensor, expected: Tensor, system: str) -> None:
    error = float((found.float() - expected).norm() / expected.norm())
    bound = RMS_BOUND[found.dtype]
    if not error <= bound:  # NaN is red too
        raise NumericsError(
            f"{system}: relative RMS error {error:.2e} against the reference is above the bound {bound:.0e}; "
            "its speed is not reported."
        )


def _time(bench: str, setting: str, systems: Mapping[str, Calls]) -> list[dict[str, Any]]:
    """One entry per system. The systems take turns, so that what else the machine does falls on all of them."""
    bandwidth = read_bandwidth_gbps()
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    with torch.inference_mode():
        for turn in range(-2, _TURNS):
            for system, (calls, _) in systems.items():
                call = calls[turn % len(calls)]
                start = time.perf_counter()
                call()
                if turn >= 0:
                    seconds[system].append(time.perf_counter() - start)
    entries = []
    for system, (calls, nbytes) in systems.items():
        median = statistics.median(seconds[system])
        gbps = nbytes / median / 1e9
        entries.append(
            {
                "bench": bench,
                "system": system,
                "setting": setting,
                "decode_ms_median": median * 1e3,
                "decode_ms_best": min(seconds[system]) * 1e3,
                "time_of_torch": median / statistics.median(seconds[_TORCH]),
                "weight_bytes": nbytes,
                "matrices": len(calls),
                "read_gbps_median": gbps,
                "bandwidth_gbps": bandwidth,
                "bandwidth_share": gbps / bandwidth,
                "threads": torch.get_num_threads(),
            }
        )
    return entries


def _of_operation(name: str) -> Callable[[], list[dict[str, Any]]]:
    """The benchmark in an operation's own folder, imported when it runs because it uses this module."""

    def run_it() -> list[dict[str, Any]]:
        module = importlib.import_module(f"trimtab.kernels.{name}.bench")
        entries: list[dict[str, Any]] = getattr(module, f"{name}_bench")()
        return entries

    return run_it


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "grid-matmul": grid_matmul_bench,
    "grid-forms": grid_forms_bench,
    "grid-prefill": grid_prefill_bench,
    "grid-many": grid_many_bench,
    "half-linear": half_linear_bench,
    "int-matmul": _of_operation("int_matmul"),
    "codebook-matmul": _of_operation("codebook_matmul"),
    "sparse-matmul": _of_operation("sparse_matmul"),
    "gather-matmul": _of_operation("gather_matmul"),
}


def run(name: str | None = None) -> list[dict[str, Any]]:
    """Entries of one benchmark, or of all: one per system and setting. Raises ConfigError for an unknown name,
    NumericsError if a system does not compute what the reference does."""
    if name is None:
        return [entry for bench in BENCHMARKS.values() for entry in bench()]
    key = name.replace("_", "-")
    if key not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark '{name}'. {did_you_mean(name, BENCHMARKS)}")
    return BENCHMARKS[key]()


def write(entries: Sequence[dict[str, Any]], directory: str | Path) -> list[Path]:
    """Keep entries as <bench>-<machine>-<date>.json and .md, with machine, versions and command. Raises OutputError."""
    processor = re.sub(r"[^a-z0-9]+", "-", str(machine()["cpu"]).lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    written = []
    for bench in dict.fromkeys(str(entry["bench"]) for entry in entries):
        own = [entry for entry in entries if entry["bench"] == bench]
        stem = Path(directory, f"{bench}-{processor}-{machine()['cores']}-cores-{date}")
        command = "python -m trimtab.kernels.bench --out benchmarks/results"
        facts = {"command": command, "machine": machine(), "versions": versions(), "entries": own}
        for suffix, content in ((".json", json.dumps(facts, indent=1) + "\n"), (".md", _markdown(facts))):
            path = stem.with_name(stem.name + suffix)
            write_text_atomically(path, content)
            written.append(path)
    return written


def _markdown(facts: dict[str, Any]) -> str:
    lines = [
        f"`{facts['command']}` on {facts['machine']['cpu']}, {facts['machine']['cores']} cores; "
        f"torch {facts['versions']['torch']}, Python {facts['versions']['python']}.",
        "",
        "| setting | system | ms (median) | torch = 1 | GB/s | share of read bandwidth | weight MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {e['setting']} | {e['system']} | {e['decode_ms_median']:.3f} | {e['time_of_torch']:.2f} "
        f"| {e['read_gbps_median']:.1f} | {e['bandwidth_share']:.0%} of {e['bandwidth_gbps']:.1f} "
        f"| {e['weight_bytes'] / 1e6:.1f} |"
        for e in facts["entries"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the result files, print their names."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.kernels.bench", description="Measure the kernels.")
    parser.add_argument("name", nargs="?", help="one benchmark; without it, all")
    parser.add_argument("--out", default="benchmarks/results", help="directory for the results")
    arguments = parser.parse_args()
    for path in write(run(arguments.name), arguments.out):
        print(path)


if __name__ == "__main__":
    main()
