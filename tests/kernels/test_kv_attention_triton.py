"""kv_attention in Triton against its reference in float64, interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels.kv_attention import Lane, Rope, Run, kv_attention
from trimtab.kernels.kv_attention import triton as backend
from trimtab.kernels.kv_attention.codes import pack_rows
from trimtab.kernels.kv_attention.reference import kv_attention_reference
from trimtab.kernels.kv_attention.run import tiles

BOUND = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS error; the rounding of the result in the dtype of query takes most of the last two."""


class Maker:
    """Random runs of all forms. What lies beyond their tokens in a last tile is NaN, except codes, which are zero."""

    def __init__(self, heads: int, dim: int, seed: int = 0, device: str = "cpu") -> None:
        self.heads, self.dim, self.device = heads, dim, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def exact(self, tokens: int, dtype: torch.dtype = torch.float16, *, slack: int = 0, **rest: Any) -> Run:
        """`slack`: other tokens before and after it in the memory of a window."""
        values = self.normal(self.heads, tokens + 2 * slack, self.dim, dtype=dtype)[:, slack : slack + tokens]
        return self._run(tokens, exact=values, **rest)

    def grid(self, tokens: int, bits: int, *, group_tokens: int = 0, group_channels: int = 0, **rest: Any) -> Run:
        if group_tokens:
            shape = (self.heads, -(-tokens // group_tokens), self.dim)
            parameters = [self.normal(*shape) for _ in range(2)]
        else:
            shape = (self.heads * self.dim // group_channels, 32 * tiles(tokens))
            parameters = [self._unused(self.normal(*shape), tokens) for _ in range(2)]
        groups = {"group_tokens": group_tokens, "group_channels": group_channels}
        scale, minimum = parameters[0].abs() / 2**bits, parameters[1]
        return self._run(
            tokens, bits=bits, codes=self._codes(tokens, bits), **({"scale": scale, "minimum": minimum} | groups | rest)
        )

    def table(self, tokens: int, bits: int, **rest: Any) -> Run:
        return self.grid(tokens, bits, levels=self.normal(2**bits, dtype=torch.float32), **rest)

    def coupled(self, tokens: int, bits: int, coupled: int, **rest: Any) -> Run:
        groups = self.dim // coupled
        if bits > 8:
            rest["high_codes"] = self._codes(tokens, bits - 8, groups)
        codebook = self.normal(self.heads, groups, 2**bits, coupled)
        codes = self._codes(tokens, min(bits, 8), groups)
        return self._run(tokens, bits=bits, coupled=coupled, codes=codes, codebook=codebook, **rest)

    def low_rank(self, tokens: int, rank: int) -> dict[str, Tensor]:
        a = self._unused(self.normal(self.heads, rank, 32 * tiles(tokens)), tokens)
        return {"token_factors": a, "channel_factors": self.normal(self.heads, rank, self.dim)}

    def outliers(self, tokens: int, per_tile: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """About so many per tile, and none in every third tile."""
        starts, places = [0], []
        for head in range(self.heads):
            for tile in range(tiles(tokens)):
                live = min(32, tokens - 32 * tile)
                chosen = torch.randperm(self.dim * live, generator=self.generator)[:per_tile]
                if (head + tile) % 3 < 2:
                    places.append(chosen // live * 32 + chosen % live)
                starts.append(starts[-1] + (len(places[-1]) if (head + tile) % 3 < 2 else 0))
        together = torch.cat(places)
        return {
            "outlier_starts": torch.tensor(starts, dtype=torch.int32),
            "outlier_places": together.to(torch.int16),
            "outlier_values": 4 * self.normal(len(together), dtype=dtype),
        }

    def overrides(self, tokens: list[int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        values = 2 * self.normal(self.heads, len(tokens), self.dim, dtype=dtype)
        return {"override_tokens": torch.tensor(tokens, dtype=torch.int32), "override_values": values}

    def _codes(self, tokens: int, bits: int, channels: int | None = None) -> Tensor:
        shape = (self.heads, tokens, channels or self.dim)
        return pack_rows(torch.randint(0, 2**bits, shape, generator=self.generator), bits)

    def _unused(self, x: Tensor, tokens: int) -> Tensor:
        x[..., tokens:] = torch.nan
        return x

    def _run(self, tokens: int, **fields: Any) -> Run:
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in fields.items()}
        return Run(tokens=tokens, heads=self.heads, head_dim=self.dim, **moved)


def rope_table(dim: int, positions: int = 400) -> Rope:
    angles = torch.outer(torch.arange(positions).float(), 100.0 ** -(torch.arange(dim // 2) / (dim // 2)))
    return Rope(angles.cos(), angles.sin())


def one_pair(key: Callable[[Maker, int], Run], value: Callable[[Maker, int], Run], dim: int = 64, **rest: Any) -> Any:
    """Two rows of one lane each, of different lengths: a run that ends within a tile, then an exact window."""
    maker = Maker(2, dim)
    lanes = [
        Lane(row, (0, 1), (key(maker, n), maker.exact(5, slack=3)), (value(maker, n), maker.exact(5, slack=3)))
        for row, n in ((0, 75), (1, 33))
    ]
    return {"query": maker.normal(2, 4, 1, dim, dtype=torch.float32), "lanes": lanes, "scale": dim**-0.5} | rest


def channel_grid(bits: int, group: int = 32) -> Callable[[Maker, int], Run]:
    return lambda maker, n: maker.grid(n, bits, group_tokens=group)


def token_grid(bits: int, group: int = 32) -> Callable[[Maker, int], Run]:
    return lambda maker, n: maker.grid(n, bits, group_channels=group)


def gear(maker: Maker, n: int) -> Run:
    return maker.grid(n, 2, group_tokens=96, **maker.low_rank(n, 3), **maker.outliers(n, 40))


def gear_value(maker: Maker, n: int) -> Run:
    return maker.grid(n, 2, group_channels=128, **maker.low_rank(n, 2), **maker.outliers(n, 3, torch.bfloat16))


def unrotated_key(maker: Maker, n: int) -> Run:
    """As KVQuant stores keys, and pivots on top, more than are looked at at once."""
    pivots = maker.overrides([0, 1, 7, *range(10, 30), 32])
    return maker.table(n, 3, group_tokens=96, first_position=6, **maker.outliers(n, 5), **pivots)


def different_cuts(dim: int = 64) -> Any:
    """KIVI: sinks, then blocks of keys and of values with different ends; a second lane holds all exact."""
    maker = Maker(1, dim, seed=3)
    keys = (maker.exact(3), maker.grid(96, 2, group_tokens=32), maker.exact(7))
    values = (maker.exact(3), *(maker.grid(32, 2, group_channels=32) for _ in range(2)), maker.exact(39, slack=1))
    window = [maker.exact(50) for _ in range(2)]
    # The second row holds nothing of its second head.
    lanes = [
        Lane(0, (1,), keys, values),
        Lane(0, (0,), (window[0],), (window[1],)),
        Lane(1, (0,), (window[1],), (window[0],)),
        Lane(1, (1,), (), ()),
    ]
    return {"query": maker.normal(2, 6, 1, dim, dtype=torch.float32), "lanes": lanes, "scale": 0.1}


def several_queries(dtype: torch.dtype = torch.float32) -> Any:
    """A draft of five tokens over two rows, the shorter one as long as what of it is masked."""
    maker = Maker(1, 64, seed=4)
    lanes = [
        Lane(row, (0,), (maker.grid(n, 4, group_tokens=16), maker.exact(2)), (maker.exact(n + 2),))
        for row, n in ((0, 70), (1, 3))
    ]
    return {
        "query": 3 * maker.normal(2, 3, 5, 64, dtype=dtype),
        "lanes": lanes,
        "scale": 0.2,
        "softcap": 4.0,
        "bias": maker.normal(2, 3, 74, dtype=torch.float32),
        "first_visible": torch.tensor([[0, 3, 50, 71, 72], [0, 0, 1, 2, 4]]),
        "tail_visible": torch.rand(2, 5, 6, generator=maker.generator) < 0.6,
    }


def partial_rope() -> Any:
    """A rope over 48 of 80 channels; the window has positions too (StreamingLLM), sinks have none."""
    maker = Maker(1, 80, seed=5)
    keys = (maker.exact(4), maker.grid(40, 8, group_tokens=32, first_position=20), maker.exact(30, first_position=60))
    lanes = [Lane(0, (0,), keys, (maker.exact(4), maker.coupled(40, 3, 2), maker.exact(30)))]
    return {
        "query": maker.normal(1, 2, 1, 80, dtype=torch.float32),
        "lanes": lanes,
        "scale": 0.1,
        "rope": rope_table(48),
    }


def two_forms() -> Any:
    """Rows whose runs have different numbers of bits: one launch for each."""
    maker = Maker(2, 64, seed=6)
    lanes = [
        Lane(0, (0, 1), (maker.grid(40, 2, group_tokens=32),), (maker.grid(40, 2, group_channels=64),)),
        Lane(1, (0, 1), (maker.grid(64, 4, group_tokens=32), maker.exact(9)), (maker.grid(73, 2, group_channels=64),)),
    ]
    return {"query": maker.normal(2, 2, 1, 64, dtype=torch.float32), "lanes": lanes, "scale": 0.1}


CASES: dict[str, Callable[[], Any]] = {
    "exact": lambda: one_pair(lambda m, n: m.exact(n), lambda m, n: m.exact(n, slack=2)),
    "1 bit": lambda: one_pair(channel_grid(1, 16), token_grid(1)),
    "2 bits": lambda: one_pair(channel_grid(2), token_grid(2, 64)),
    "3 bits": lambda: one_pair(channel_grid(3, 64), token_grid(3, 128)),
    "4 bits, d = 80": lambda: one_pair(channel_grid(4), token_grid(4, 20), dim=80),
    "8 bits, d = 96": lambda: one_pair(channel_grid(8), token_grid(8), dim=96),
    "d = 128": lambda: one_pair(channel_grid(2), token_grid(4, 128), dim=128),
    "tables": lambda: one_pair(
        lambda m, n: m.table(n, 4, group_tokens=32, minimum=None), lambda m, n: m.table(n, 3, group_channels=64)
    ),
    "coupled": lambda: one_pair(lambda m, n: m.coupled(n, 8, 8), lambda m, n: m.coupled(n, 10, 4)),
    "low rank and outliers": lambda: one_pair(gear, gear_value),
    "before rotary embedding": lambda: one_pair(unrotated_key, gear_value, rope=rope_table(64)),
    "different cuts": different_cuts,
    "several queries": several_queries,
    "partial rope": partial_rope,
    "two forms": two_forms,
    "float16": lambda: several_queries(torch.float16),
    "bfloat16": lambda: several_queries(torch.bfloat16),
}


def errors(case: Any) -> dict[str, float]:
    """Of outputs, relative RMS; of log-sum-exp, the largest difference; NaN where one is infinite and the other not."""
    expected, expected_lse = kv_attention_reference(**case | {"query": case["query"].double()})
    found, lse = kv_attention(**case)
    assert found.dtype == case["query"].dtype
    assert found.shape == case["query"].shape
    same = lse.double() == expected_lse  # both -infinity, too
    return {
        "output": float((found.double() - expected).norm() / expected.norm()),
        "lse": float(torch.where(same, 0.0, lse - expected_lse).abs().max()),
        "hidden": float(found[expected_lse == -torch.inf].abs().sum()),
    }


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases, from a process of its own: Triton reads TRITON_INTERPRET once."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = (
        "import json, torch, test_kv_attention_triton as t\n"
        "plain = torch.empty\n"
        "torch.empty = lambda *a, **k: plain(*a, **k).fill_(float('nan'))\n"  # what is left out shows
        "print(json.dumps({name: t.errors(case()) for name, case in t.CASES.items()}))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRIMTAB_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_interpreted_parity(interpreted: dict[str, dict[str, float]], name: str) -> None:
    bound = BOUND[CASES[name]()["query"].dtype]
    error = interpreted[name]
    assert error["output"] <= bound, error
    assert error["lse"] <= 1e-4, error
    assert error["hidden"] == 0, error
