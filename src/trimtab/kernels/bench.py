"""Speed of the kernels beside torch and beside the machine's memory bandwidth: `trimtab bench`.

    python -m trimtab.kernels.bench --out benchmarks/results     measure all and keep the results

A benchmark first compares every system with the reference on the very inputs it is about to time, and raises instead of
printing a speed when the error is above the bound of the parity tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
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
from trimtab.kernels.grid_matmul.reference import grid_matmul_reference
from trimtab.kernels.half_linear import half_linear
from trimtab.kernels.half_linear.reference import half_linear_reference
from trimtab.kernels.packing import packed_bytes

RMS_BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS error against the float32 reference that every backend stays below; the rounding of the result in x's
dtype takes most of it. Parity tests use the same numbers."""

_TRAFFIC_BYTES = 1 << 30  # distinct weight bytes read between two uses of one matrix: no cache holds them
_CHECKED_ROWS = 64  # output rows whose results are compared; the kernels treat all rows alike


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


SHAPES = (Shape(4096, 11008, 1), Shape(4096, 11008, 8), Shape(4096, 11008, 64))
BITS = (2, 3, 4, 8)
HALF_SHAPES = tuple(Shape(*size, batch) for size in ((4096, 11008), (1024, 1024), (2816, 1024)) for batch in (1, 8))


def grid_matmul_bench(shapes: Sequence[Shape] = SHAPES, bits: Sequence[int] = BITS) -> list[dict[str, Any]]:
    """Packed weights of each number of bits, and torch's bfloat16 linear on the same shapes."""
    entries = []
    for shape in shapes:
        what = ("grid-matmul", f"{shape}, group {shape.group_size}", read_bandwidth_gbps())
        x = _inputs(shape)
        entries += [_time(f"trimtab/grid-{b}", *what, *_grid_calls(shape, b, x)) for b in bits]
        torch_calls = _dense_calls(_dense_weights(shape), x, torch.nn.functional.linear, "bf16-linear")
        entries.append(_time("torch/bf16-linear", *what, *torch_calls))
    return entries


def half_linear_bench(shapes: Sequence[Shape] = HALF_SHAPES) -> list[dict[str, Any]]:
    """Dense bfloat16 weights, multiplied by half_linear and by torch's linear."""
    entries = []
    for shape in shapes:
        what = ("half-linear", str(shape), read_bandwidth_gbps())
        x, weights = _inputs(shape), _dense_weights(shape)
        for system, linear in (("trimtab/half-linear", half_linear), ("torch/bf16-linear", torch.nn.functional.linear)):
            entries.append(_time(system, *what, *_dense_calls(weights, x, linear, system)))
    return entries


def _inputs(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()


def _grid_calls(shape: Shape, bits: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], int]:
    """One call per distinct matrix, and the bytes of one: codes and scales. Raises NumericsError if parity is red."""
    generator = torch.Generator().manual_seed(bits)
    row = packed_bytes(shape.in_features, bits)
    groups = shape.in_features // shape.group_size
    nbytes = shape.out_features * (row + 2 * groups)
    calls: list[Callable[[], Tensor]] = []
    for _ in range(max(2, -(-shape.traffic_bytes // nbytes))):
        packed = torch.randint(0, 256, (shape.out_features, row), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(shape.out_features, groups, generator=generator) + 0.5).half()
        weight = GridWeight(packed, scales, None, bits, shape.group_size, shape.in_features)
        if not calls:
            part = slice(0, _CHECKED_ROWS)
            (expected,) = grid_matmul_reference(x.float(), [replace(weight, packed=packed[part], scales=scales[part])])
            _demand_parity(grid_matmul_many(x, [weight])[0][:, part], expected, f"grid-{bits}")
        calls.append(lambda w=weight: grid_matmul_many(x, [w])[0])  # type: ignore[misc]
    return calls, nbytes


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
) -> tuple[list[Callable[[], Tensor]], int]:
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


def _time(
    system: str, bench: str, setting: str, bandwidth: float, calls: list[Callable[[], Tensor]], nbytes: int
) -> dict[str, Any]:
    with torch.inference_mode():
        for call in calls[:2]:
            call()
        rounds = max(1, -(-30 // len(calls)))
        seconds = []
        for call in calls * rounds:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    gbps = nbytes / median / 1e9
    return {
        "bench": bench,
        "system": system,
        "setting": setting,
        "decode_ms_median": median * 1e3,
        "decode_ms_best": min(seconds) * 1e3,
        "weight_bytes": nbytes,
        "matrices": len(calls),
        "read_gbps_median": gbps,
        "bandwidth_gbps": bandwidth,
        "bandwidth_share": gbps / bandwidth,
        "threads": torch.get_num_threads(),
    }


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "grid-matmul": grid_matmul_bench,
    "half-linear": half_linear_bench,
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
        "| setting | system | ms (median) | GB/s | share of read bandwidth | weight MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {e['setting']} | {e['system']} | {e['decode_ms_median']:.2f} | {e['read_gbps_median']:.1f} "
        f"| {e['bandwidth_share']:.0%} of {e['bandwidth_gbps']:.1f} | {e['weight_bytes'] / 1e6:.1f} |"
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
