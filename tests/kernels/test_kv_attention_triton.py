"""kv_attention in Triton against its reference in float64, interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels.kv_attention import Lane, Rope, Run, kv_attention
from trimtab.kernels.kv_attention import triton as backend
from trimtab.kernels.kv_attention.bench_gpu import BITS, Setting, _lane, kv_attention_gpu_bench
from trimtab.kernels.kv_attention.reference import kv_attention_reference
from trimtab.kernels.kv_attention.triton_tables import make_tables, segments

from .interpreted import needs_triton, run_interpreted
from .kv_cases import random_query, random_rope, random_run

HALF = torch.float16
BOUND = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative RMS error; the rounding of the result in the dtype of query takes most of the last two."""
OPTIONAL = ("softcap", "bias", "first_visible", "tail_visible")


def two_rows(key: dict[str, Any], value: dict[str, Any], dim: int = 64, *, window: bool = True, **rest: Any) -> Any:
    """Two rows of one lane each, of different lengths: a run that ends within a tile, then an exact window."""
    lanes = []
    for row, tokens in ((0, 75), (1, 33)):
        keys, values = (random_run(tokens, dim=dim, seed=2 * row + i, **side) for i, side in enumerate((key, value)))
        last = [random_run(5, dim=dim, seed=9 + 2 * row + i, dtype=HALF) for i in range(2)] if window else []
        lanes.append(Lane(row, (0, 1), (keys, *last[:1]), (values, *last[1:])))
    return {"query": random_query(2, 4, 1, dim), "lanes": lanes, "scale": dim**-0.5} | rest


def grids(bits: int, group_tokens: int, group_channels: int, dim: int = 64) -> Any:
    return two_rows({"bits": bits, "group_tokens": group_tokens}, {"bits": bits, "group_channels": group_channels}, dim)


def before_rope(**changes: Any) -> Any:
    """As KVQuant stores keys; and more pivots than are looked at together."""
    key = {"bits": 3, "levels": True, "group_tokens": 96, "outliers": 0.01, "first_position": 6, "overrides": 20}
    value = {"bits": 3, "levels": True, "group_channels": 128, "outliers": 0.01, "overrides": 1}
    return two_rows(key, value, rope=random_rope(100, 32)) | changes


def different_cuts() -> Any:
    """KIVI: sinks, then blocks of keys and of values with different ends. Another lane is exact; one is empty."""
    keys = (
        random_run(3, 1, dtype=HALF, seed=0),
        random_run(96, 1, bits=2, group_tokens=32, seed=1),
        random_run(7, 1, dtype=HALF, seed=2),
    )
    values = (
        random_run(3, 1, dtype=HALF, seed=3),
        *(random_run(32, 1, bits=2, group_channels=32, seed=4 + i) for i in range(2)),
        random_run(39, 1, dtype=HALF, seed=6),
    )
    exact = [random_run(50, 1, dtype=HALF, seed=7 + i) for i in range(2)]
    lanes = [
        Lane(0, (1,), keys, values),
        Lane(0, (0,), (exact[0],), (exact[1],)),
        Lane(1, (0,), (exact[1],), (exact[0],)),
        Lane(1, (1,), (), ()),
    ]
    return {"query": random_query(2, 6, 1, 64), "lanes": lanes, "scale": 0.1}


def several_queries(dtype: torch.dtype = torch.float32) -> Any:
    """A draft of five tokens after two rows, one shorter than the mask; everything that can be done to scores."""
    lanes = []
    for row, tokens in ((0, 70), (1, 3)):
        keys = random_run(tokens, 1, bits=4, group_tokens=16, seed=row), random_run(2, 1, dtype=HALF, seed=2 + row)
        lanes.append(Lane(row, (0,), keys, (random_run(tokens + 2, 1, dtype=HALF, seed=4 + row),)))
    draw = torch.Generator().manual_seed(5)
    return {
        "query": 3 * random_query(2, 3, 5, 64, dtype),
        "lanes": lanes,
        "scale": 0.2,
        "softcap": 4.0,
        "bias": torch.randn(2, 3, 74, generator=draw),
        "first_visible": torch.tensor([[0, 3, 50, 71, 72], [0, 0, 1, 2, 5]]),
        "tail_visible": torch.rand(2, 5, 6, generator=draw) < 0.6,
    }


def long() -> Any:
    """Items of more than one step, of which the first are hidden from the second query."""
    sides = {"bits": 2, "group_tokens": 32}, {"bits": 2, "group_channels": 32}
    lanes = [Lane(0, (0,), *((random_run(700, 1, seed=i, **side),) for i, side in enumerate(sides)))]
    assert backend.item_tokens(lanes, torch.device("cpu")) == 128
    first = torch.tensor([[100, 600]])
    return {"query": 3 * random_query(1, 2, 2, 64), "lanes": lanes, "scale": 0.1, "first_visible": first}


def many_runs() -> Any:
    """More items than are merged at once, the last ones with the largest scores."""
    keys, values = ([random_run(2, 1, dtype=HALF, seed=2 * i + j) for i in range(20)] for j in range(2))
    lanes = [Lane(0, (0,), tuple(keys), tuple(values))]
    return {"query": random_query(1, 1, 1, 64), "lanes": lanes, "scale": 0.1, "bias": torch.arange(40.0).view(1, 1, 40)}


def partial_rope() -> Any:
    """A rope over 48 of 80 channels; the window has positions too (StreamingLLM), sinks have none."""
    keys = (
        random_run(4, 1, 80, dtype=HALF, seed=0),
        random_run(40, 1, 80, bits=8, group_channels=20, first_position=20, seed=1),
        random_run(30, 1, 80, dtype=HALF, first_position=60, seed=2),
    )
    values = (
        random_run(4, 1, 80, dtype=HALF, seed=3),
        random_run(40, 1, 80, bits=3, coupled=2, seed=4),
        random_run(30, 1, 80, dtype=HALF, seed=5),
    )
    lanes = [Lane(0, (0,), keys, values)]
    return {"query": random_query(1, 2, 1, 80), "lanes": lanes, "scale": 0.1, "rope": random_rope(100, 24)}


def two_forms() -> Any:
    """Rows whose keys have different numbers of bits: one launch for each."""
    value = {"bits": 2, "group_channels": 64}
    lanes = [
        Lane(0, (0, 1), (random_run(40, bits=2, group_tokens=32),), (random_run(40, **value),)),
        Lane(
            1, (0, 1), (random_run(64, bits=4, group_tokens=32), random_run(9, dtype=HALF)), (random_run(73, **value),)
        ),
    ]
    return {"query": random_query(2, 2, 1, 64), "lanes": lanes, "scale": 0.1}


CASES: dict[str, Callable[[], Any]] = {
    "exact": lambda: two_rows({"dtype": torch.bfloat16}, {"dtype": torch.float32}, window=False),
    "1 bit": lambda: grids(1, 16, 32),
    "2 bits": lambda: grids(2, 32, 64),
    "3 bits": lambda: grids(3, 64, 128),
    "4 bits, d = 80": lambda: grids(4, 32, 20, dim=80),
    "8 bits, d = 96": lambda: grids(8, 32, 32, dim=96),
    "d = 128": lambda: grids(2, 32, 128, dim=128),
    "tables": lambda: two_rows(
        {"bits": 4, "levels": True}, {"bits": 3, "levels": True, "group_tokens": 32, "minimum": False}
    ),
    "coupled": lambda: two_rows({"bits": 8, "coupled": 8}, {"bits": 10, "coupled": 4}),
    "low rank and outliers": lambda: two_rows(
        {"bits": 2, "group_tokens": 96, "rank": 3, "outliers": 0.02},
        {"bits": 2, "group_channels": 128, "rank": 2, "outliers": 0.001, "outlier_dtype": torch.bfloat16},
    ),
    "before rotary embedding": before_rope,
    "different cuts": different_cuts,
    "several queries": several_queries,
    "long": long,
    "many runs": many_runs,
    "partial rope": partial_rope,
    "two forms": two_forms,
    "float16": lambda: several_queries(torch.float16),
    "bfloat16": lambda: several_queries(torch.bfloat16),
}


def errors(case: Any, device: str = "cpu") -> dict[str, float]:
    """Of outputs: relative RMS, and the sum of those that see no key. Of log-sum-exp: the largest difference."""
    expected, expected_lse = kv_attention_reference(**case | {"query": case["query"].double()})
    found, lse = (tensor.cpu() for tensor in kv_attention(**_moved(case, device)))
    assert found.dtype == case["query"].dtype
    assert found.shape == case["query"].shape
    same = lse.double() == expected_lse  # both -infinity, too
    return {
        "output": float((found.double() - expected).norm() / expected.norm()),
        "lse": float(torch.where(same, 0.0, lse - expected_lse).abs().max()),
        "hidden": float(found[expected_lse == -torch.inf].abs().sum()),
    }


def _moved(thing: Any, device: str) -> Any:
    """Its tensors on a device; windows with the strides that they have."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if isinstance(thing, dict):
        return {name: _moved(value, device) for name, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(_moved(value, device) for value in thing)
    if isinstance(thing, (Run, Lane, Rope)):
        fields = {field.name: _moved(getattr(thing, field.name), device) for field in dataclasses.fields(thing)}
        return type(thing)(**fields)
    return thing


def _demand_small(error: dict[str, float], dtype: torch.dtype) -> None:
    assert error["output"] <= BOUND[dtype], error
    assert error["lse"] <= (1e-4 if dtype == torch.float32 else 2e-2), error
    assert error["hidden"] == 0, error


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases."""
    code = (
        "import json, torch, kernels.test_kv_attention_triton as t\n"
        "plain = torch.empty\n"
        "torch.empty = lambda *a, **k: plain(*a, **k).fill_(float('nan'))\n"  # what is left out shows
        "print(json.dumps({name: t.errors(case()) for name, case in t.CASES.items()}))"
    )
    found: dict[str, dict[str, float]] = json.loads(run_interpreted(code).splitlines()[-1])
    return found


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_parity(interpreted: dict[str, dict[str, float]], name: str) -> None:
    _demand_small(interpreted[name], CASES[name]()["query"].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", BOUND)
def test_parity_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "triton")
    case = CASES[name]()
    _demand_small(errors(case | {"query": case["query"].to(dtype)}, "cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("tokens", [8192, 20011])
def test_parity_on_a_gpu_at_real_sizes(monkeypatch: pytest.MonkeyPatch, dim: int, tokens: int) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "triton")
    sides = {"bits": 2, "group_tokens": 32, "outliers": 0.01, "rank": 2}, {"bits": 4, "group_channels": dim}
    lanes = []
    for row in range(2):
        runs = [(random_run(tokens, 4, dim, **side), random_run(100, 4, dim, dtype=HALF)) for side in sides]
        lanes.append(Lane(row, (0, 1, 2, 3), *runs))
    case = {"query": random_query(2, 16, 1, dim, HALF), "lanes": lanes, "scale": dim**-0.5}
    _demand_small(errors(case, "cuda"), HALF)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["exact", "before rotary embedding", "coupled", "several queries"])
def test_compiles_for_a_gpu_without_one(name: str) -> None:
    """The interpreter takes programs that the compiler does not. Down to machine code for an H100 or H200."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from trimtab.kernels.kv_attention.triton_program import attend_program

    case = CASES[name]()
    dim, queries = case["query"].shape[3], backend.queries_per_head(case["query"], case["lanes"])
    tables = make_tables(case["lanes"], 64, torch.device("cpu"))
    constants: dict[str, Any] = {f"HAS_{name.split('_')[0].upper()}": name in case for name in OPTIONAL}
    constants |= {"HEADS": tables.heads, "QUERIES": queries, "Q": 16, "TILES": 2, "DOT": "float16"}
    constants |= {"DIM": dim, "D": 64 if dim == 64 else 128}
    constants |= {"KEY": tables.launches[0].key, "VALUE": tables.launches[0].value}
    if case["query"].shape[2] == 1:
        constants["length"] = 1  # as a launch does with integers that are one
    types = dict.fromkeys(("runs", "items", "lanes", "order", "first_visible"), "*i64")
    types |= dict.fromkeys(("cos", "sin", "bias", "sums", "statistics"), "*fp32")
    types |= {"query": "*fp16", "tail_visible": "*u8", "scale": "fp32", "softcap": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in attend_program.arg_names}
    source = ASTSource(
        attend_program,
        signature,
        {(i,): constants[n] for i, n in enumerate(signature) if n in constants},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n].startswith("*")},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 << 10


# What is refused


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def _one_lane(key: Run, *values: Run) -> Any:
    return {"query": random_query(1, 2, 1, 64), "lanes": [Lane(0, (0, 1), (key,), values)], "scale": 0.1}


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        (_one_lane(random_run(40, hadamard=64), random_run(40)), "keys: a run is stored rotated"),
        (_one_lane(random_run(40), random_run(40, order=True)), "values: a run is stored rotated"),
        (_one_lane(random_run(40), random_run(20), random_run(20)), "cut within each other's tiles"),
        (_one_lane(random_run(40, first_position=0), random_run(40)), "before rotary embedding, and no rope"),
        (
            _one_lane(random_run(40), random_run(20, dtype=HALF), random_run(20, dtype=torch.float32)),
            "values mix float16 and float32",
        ),
        (before_rope(query=random_query(2, 4, 1, 64, torch.float64)), "query is torch.float64"),
        (before_rope(query=random_query(2, 140, 2, 64)), "140 queries share a KV head"),
        (before_rope(query=random_query(2, 4, 1, 64).requires_grad_()), "a gradient is wanted"),
        (before_rope(query=random_query(2, 4, 1, 512)), "heads have size 512"),
        (before_rope(query=random_query(2, 4, 1, 64).to("meta")), "query is on meta"),
        (before_rope(bias=torch.zeros(2, 4, 99, device="meta")), "bias is on meta"),
    ],
)
def test_refusals(case: Any, words: str) -> None:
    assert words in str(backend.refuses(**case))


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize("name", CASES)
def test_no_case_is_refused(name: str) -> None:
    assert backend.refuses(**CASES[name]()) is None


def test_forced_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRIMTAB_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match="no CUDA device"):
        kv_attention(**two_forms())


# The benchmark


def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(KernelUnavailable, match="needs a CUDA device, and this machine has none"):
        kv_attention_gpu_bench()


@pytest.mark.usefixtures("interpreting")
def test_the_triton_backend_takes_what_the_benchmark_measures() -> None:
    lanes = [_lane(0, 300, bits, torch.device("cpu")) for bits in BITS]
    for lane in lanes:
        assert backend.refuses(random_query(1, 32, 1, 128, HALF), [lane], scale=1.0) is None


@pytest.mark.gpu
def test_the_benchmark_runs() -> None:
    entries = kv_attention_gpu_bench([Setting(2, 4096)])
    assert [entry["system"] for entry in entries] == ["torch/sdpa-fp16", "trimtab/kivi-2", "trimtab/kivi-4"]
    assert all(0 < entry["bandwidth_share"] < 1.5 for entry in entries)


# Tables


def test_segments_cover_each_token_once() -> None:
    lane = different_cuts()["lanes"][0]
    found = list(segments(lane))
    assert [part.first for part in found] == [0, 3, 35, 67, 99]
    assert [part.tokens for part in found] == [3, 32, 32, 32, 7]
    assert [part.key_start for part in found] == [0, 0, 32, 64, 0]
    assert [part.value_start for part in found] == [0, 0, 0, 0, 32]


def test_a_lane_of_codes_and_a_window_is_one_launch() -> None:
    case = two_forms()
    assert len(make_tables(case["lanes"][:1], 64, torch.device("cpu")).launches) == 1
    assert len(make_tables(case["lanes"], 64, torch.device("cpu")).launches) == 2
    lanes = grids(2, 32, 64)["lanes"]
    tables = make_tables(lanes, 64, torch.device("cpu"))
    assert [launch.count for launch in tables.launches] == [tables.item_count] == [5]
