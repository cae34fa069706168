"""What is measured of a system: the products of inputs with linear layers of several shapes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import NumericsError
from trimtab.evaluation.beside.base import Benchmark
from trimtab.kernels.bench import RMS_BOUND

SHAPES = ((2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (4096, 11008))
"""[out, in]: the distinct layers of the model of `bench decode`, and a larger one."""
LARGEST_DISTANCE = 0.7
"""From the dense product, for layers that give no dense weight of theirs to be compared with; 2 bits reach 0.5."""
_LEAST_CALLS, _LEAST_SECONDS = 8, 0.5


@dataclass(frozen=True, kw_only=True)
class Setting(Benchmark):
    """What is multiplied. Weights and inputs are random and in bfloat16.

    shapes          [out, in] of the layers
    rows            of the inputs, one after the other
    traffic_bytes   distinct weights read between two uses of one copy of a layer, so that no cache holds it
    """

    bench: ClassVar[str] = "linear"
    package: ClassVar[str] = "trimtab.evaluation.linear_speed"

    shapes: Sequence[Sequence[int]] = SHAPES
    rows: Sequence[int] = (1, 8, 64, 512)
    traffic_bytes: int = 1 << 28


@dataclass(frozen=True)
class Layer:
    """A layer to call. `nbytes` of its weight; `dense`, float32 [out, in], is what it stands for, if it tells."""

    call: Callable[[Tensor], Tensor]
    nbytes: int
    dense: Tensor | None


def measure(make: Callable[[Tensor], Layer], setting: Setting) -> dict[str, Any]:
    """{"products": one entry per shape and number of rows}. Raises NumericsError, and gives none, if one is wrong.

    decode_ms_median, _best   one product, each time with another copy of the layer
    weight_bytes              of the layer
    distance                  relative RMS distance from the product with the uncompressed weight
    parity                    that from the product with the layer's own dense weight; None where it does not tell
    """
    products = []
    generator = torch.Generator().manual_seed(setting.seed)
    with torch.inference_mode():
        for out_features, in_features in setting.shapes:
            weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
            with torch.inference_mode(False), torch.no_grad():
                layer = make(weight.clone().bfloat16())
                copies = max(1, -(-setting.traffic_bytes // layer.nbytes) - 1)
                calls = [layer.call, *(copy.deepcopy(layer.call) for _ in range(copies))]
            for rows in setting.rows:
                x = torch.randn(rows, in_features, generator=generator).bfloat16()
                products.append(
                    {
                        "shape": [out_features, in_features],
                        "rows": rows,
                        "weight_bytes": layer.nbytes,
                        **_compared(layer, x, weight.bfloat16().float()),
                        **_timed(calls, x),
                    }
                )
    return {"products": products}


def _compared(layer: Layer, x: Tensor, weight: Tensor) -> dict[str, float | None]:
    found = layer.call(x)
    distance = _distance(found, x.float() @ weight.t())
    parity = None if layer.dense is None else _distance(found, x.float() @ layer.dense.t())
    wrong, bound = (distance, LARGEST_DISTANCE) if parity is None else (parity, 2 * RMS_BOUND[x.dtype])
    if not wrong <= bound:  # NaN is red too
        raise NumericsError(
            f"relative RMS error {wrong:.2e} of a product of {list(x.shape)} with {list(weight.shape)} is above the "
            f"bound {bound:.0e}; the speed is not reported."
        )
    return {"distance": distance, "parity": parity}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _timed(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    for call in calls:
        call(x)
        if x.shape[0] > 1:
            break  # one row touches every copy, and prepares it
    seconds: list[float] = []
    while len(seconds) < _LEAST_CALLS or sum(seconds) < _LEAST_SECONDS:
        call = calls[len(seconds) % len(calls)]
        start = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - start)
    return {"decode_ms_median": 1e3 * statistics.median(seconds), "decode_ms_best": 1e3 * min(seconds)}
