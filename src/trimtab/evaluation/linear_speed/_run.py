"""The run: one process per system, one entry per system, shape and number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.evaluation.beside.base import System
from trimtab.evaluation.beside.run import read_speed, run_systems
from trimtab.evaluation.linear_speed.measure import Setting


def run(
    systems: Sequence[System],
    setting: Setting,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`run_systems`: entries with "shape", "rows" and the figures of `measure`, and the share of the memory bandwidth
    that reading the weight once per product reaches."""

    def finish(figures: dict[str, Any], bandwidth_gbps: float) -> list[dict[str, Any]]:
        return [
            product | read_speed(product["weight_bytes"], product["decode_ms_median"], bandwidth_gbps)
            for product in figures["products"]
        ]

    return run_systems(systems, setting, None, finish, threads=threads, tell=tell)
