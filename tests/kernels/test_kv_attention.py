"""kv_attention in C++: every component of a run, alone and together, against the reference in float64."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable
from trimtab.kernels import library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.kv_attention import KV_ATTENTION, Lane, Run, kv_attention, native
from trimtab.kernels.kv_attention.reference import kv_attention_reference

from .conftest import needs_native, relative_rms
from .guarded import run_guarded
from .kv_cases import BITS, lane_of, random_query, random_rope, random_run

TOKENS = (1, 31, 32, 33, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROPE = random_rope(1200, 24)  # of 48 of 64 channels
GROUPS: tuple[dict[str, Any], ...] = (
    {"group_tokens": 32},
    {"group_tokens": 16, "minimum": False},
    {"group_tokens": 48},
    {"group_tokens": 1 << 20},
    {"group_channels": 32},
    {"group_channels": 128, "minimum": False},
    {"group_channels": 8},
    {"levels": True},
    {"levels": True, "group_tokens": 32},
    {"levels": True, "group_channels": 64},
)
PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"outliers": 0.03},
    {"rank": 3},
    {"rank": 4, "outliers": 0.02, "outlier_dtype": torch.bfloat16, "hadamard": 64, "overrides": 3},
)
OTHERS: tuple[dict[str, Any], ...] = (
    {"bits": 8, "coupled": 4},
    {"bits": 10, "coupled": 4, "overrides": 2},
    {"bits": 3, "coupled": 2, "rank": 2, "outliers": 0.02},
    {"dtype": torch.bfloat16, "overrides": 2},
    {"dtype": torch.float32, "rank": 2, "outliers": 0.02, "hadamard": 128, "order": True},
    {"bits": 3, "group_channels": 128, "hadamard": 128, "order": True, "outliers": 0.02, "rank": 2},
    {"bits": 4, "group_channels": 64, "hadamard": 32, "order": True},
    {"bits": 2, "group_tokens": 32, "order": True},
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is filled with NaN, so an output that a kernel leaves out shows."""
    plain = torch.empty

    def empty(*shape: Any, **options: Any) -> Tensor:
        return plain(*shape, **options).fill_(float("nan"))

    monkeypatch.setattr(native.torch, "empty", empty)


def assert_parity(query: Tensor, lanes: list[Lane], note: object, **options: Any) -> None:
    options = {"scale": query.shape[-1] ** -0.5, "rope": ROPE} | options
    assert native.refuses(query, lanes, **options) is None, note
    found, found_lse = native.kv_attention_native(query, lanes, **options)
    expected, lse = kv_attention_reference(query.double(), lanes, **options)
    assert found.dtype == query.dtype
    assert found_lse.dtype == torch.float32
    assert torch.isfinite(found).all(), note
    if expected.any():
        assert relative_rms(found, expected) <= RMS_BOUND[query.dtype], note
    seen = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(found_lse), seen), note
    close = 1e-5 if query.dtype == torch.float32 else 5e-4
    torch.testing.assert_close(found_lse.double()[seen], lse[seen], rtol=close, atol=close)


def both(tokens: int, values_too: bool = True, **parts: Any) -> list[Lane]:
    """A lane whose keys have these parts, and one whose values have them."""
    run = random_run(tokens, seed=7, **parts)
    plain = random_run(tokens, dtype=torch.float32, seed=8)
    return [lane_of(run, plain), *([lane_of(plain, run, row=1)] if values_too else [])]


@pytest.mark.parametrize("bits", BITS)
def test_codes(isa: str, bits: int) -> None:
    dtype = torch.float16 if isa == "avx512_bf16" else torch.float32  # the former is what has kernels of its own
    for parts, group in itertools.product(PARTS, GROUPS):
        for tokens in (33, 100) if parts else TOKENS:
            query = random_query(2, 4, 1, 64, dtype)
            assert_parity(query, both(tokens, bits=bits, **group, **parts), (tokens, group, parts))


def test_other_runs(isa: str) -> None:
    for tokens, parts in itertools.product(TOKENS, OTHERS):
        assert_parity(random_query(2, 4, 1, 64), both(tokens, **parts), (tokens, parts))


def test_rope(isa: str) -> None:
    codes: tuple[dict[str, Any], ...] = (
        {"bits": 4, "group_tokens": 32},
        {"bits": 2, "levels": True, "group_channels": 32, "outliers": 0.02, "rank": 2, "overrides": 2},
        {"dtype": torch.bfloat16},
    )
    for tokens, parts in itertools.product(TOKENS, (*OTHERS, *codes)):
        assert_parity(random_query(1, 4, 2, 64), both(tokens, False, first_position=17, **parts), (tokens, parts))


@pytest.mark.parametrize("dim", [16, 24, 40, 80, 96, 128, 256])
def test_head_dimensions(isa: str, dim: int) -> None:
    rope = random_rope(200, 8)
    kinds: list[dict[str, Any]] = [{"dtype": dtype} for dtype in DTYPES]
    kinds += [{"bits": 4, "group_tokens": 32, "rank": 2, "outliers": 0.01}, {"bits": 3, "group_channels": 8}]
    kinds += [{"bits": 8, "coupled": 4}]
    for tokens, kind, start in itertools.product((33, 100), kinds, (None, 5)):
        keys = random_run(tokens, 2, dim, seed=3, first_position=start, **kind)
        values = random_run(tokens, 2, dim, seed=4, **kind)
        assert_parity(random_query(1, 4, 1, dim), [lane_of(keys, values)], (tokens, kind, start), rope=rope)


@pytest.mark.parametrize("length", [1, 3, 8, 17, 64])
def test_queries_share_what_is_decoded(isa: str, length: int) -> None:
    kinds: tuple[dict[str, Any], ...] = (
        {"bits": 4, "group_tokens": 32, "rank": 2, "outliers": 0.01},
        {"bits": 2, "group_channels": 16},
        {"dtype": torch.bfloat16},
        {"bits": 8, "coupled": 4},
    )
    for group, kind, start in itertools.product((1, 2, 3), kinds, (None, 3)):
        keys, values = random_run(70, seed=1, first_position=start, **kind), random_run(70, seed=2, **kind)
        assert_parity(random_query(1, 2 * group, length, 64), [lane_of(keys, values)], (group, kind, start))


def ragged() -> list[Lane]:
    """Heads with tokens of their own, different cuts of keys and values, empty lanes, a row without a lane."""

    def run(tokens: int, heads: int = 2, **parts: Any) -> Run:
        return random_run(tokens, heads, seed=tokens, **parts)

    keys = [
        run(100, bits=4, group_tokens=32),
        run(31, bits=2, group_tokens=32, outliers=0.02),
        run(1200, bits=2, group_channels=32),
        run(7, dtype=torch.bfloat16),
    ]
    values = [
        run(50, bits=4, group_channels=32, rank=2),
        run(1200, bits=3, group_channels=64),
        run(88, dtype=torch.bfloat16),
    ]
    nothing = run(0, dtype=torch.float32)
    return [
        lane_of(keys, values, row=0, heads=(0, 2)),
        lane_of(run(33, 1, bits=4, group_tokens=16), run(33, 1, dtype=torch.float16), row=0, heads=(1,)),
        lane_of(nothing, nothing, row=1, heads=(0, 1)),
        Lane(2, (0, 1), (), ()),
        lane_of(run(2100, 3, bits=4, group_tokens=32), run(2100, 3, bits=4, group_channels=32), row=4, heads=(0, 1, 2)),
    ]


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_lanes_and_masks(isa: str, group: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(5)
    for length in (1, 5):
        query = random_query(5, 3 * group, length, 64, dtype)
        masks: dict[str, Tensor | float] = {
            "bias": torch.randn(5, 3 * group, 2150, generator=draw),
            "first_visible": torch.randint(0, 2200, (5, length), generator=draw),
            "tail_visible": torch.rand(5, length, 9, generator=draw) < 0.6,
            "softcap": 3.0,
        }
        for names in ((), *((name,) for name in masks), tuple(masks)):
            assert_parity(query, ragged(), (length, names), **{name: masks[name] for name in names})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(isa: str, bad: float) -> None:
    kinds: tuple[dict[str, Any], ...] = ({"group_tokens": 32}, {"group_channels": 32, "minimum": False}, {})
    for kind, dtype in itertools.product(kinds, DTYPES):
        run = random_run(50, **kind) if kind else random_run(50, dtype=torch.bfloat16)
        query = random_query(1, 4, 2, 64, dtype)
        query[0, 1, 1, 5] = bad
        found, _ = native.kv_attention_native(query, [lane_of(run, run)], scale=0.1)
        assert not torch.isfinite(found[0, 1, 1]).any(), (kind, dtype)
        assert torch.isfinite(found[0, 1, 0]).all()
        assert torch.isfinite(found[0, [0, 2, 3]]).all()


@needs_native
def test_strides_of_query_and_bias() -> None:
    query = random_query(2, 5, 4, 64).transpose(1, 2)  # [2, 4 heads, 5, 64]
    bias = torch.randn(2, 100, 4).transpose(1, 2)
    assert_parity(query, both(100, bits=4, group_tokens=32), "strides", bias=bias)
    assert_parity(random_query(2, 4, 64, 5).transpose(2, 3), both(33, bits=2, group_channels=32), "last")


@needs_native
def test_threads_do_not_change_results() -> None:
    query = random_query(5, 6, 3, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.kv_attention_native(query, ragged(), scale=0.1))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_native
def test_outliers_and_overrides_replace_what_is_stored() -> None:
    """However large what they replace is: infinity in a place that is overridden does not show."""
    tokens = torch.arange(40, dtype=torch.int32)
    values = torch.randn(2, 40, 64)
    hidden = Run(
        tokens=40,
        heads=2,
        head_dim=64,
        exact=torch.full((2, 40, 64), 1e4),
        override_tokens=tokens,
        override_values=values,
    )
    shown = Run(tokens=40, heads=2, head_dim=64, exact=values)
    query = random_query(1, 4, 1, 64)
    found = native.kv_attention_native(query, [lane_of(hidden, hidden)], scale=0.1)
    expected = native.kv_attention_native(query, [lane_of(shown, shown)], scale=0.1)
    torch.testing.assert_close(found, expected)


@needs_native
def test_it_is_chosen_and_says_why_not(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = lane_of(random_run(40, group_tokens=32))
    KV_ATTENTION._logged.clear()
    with caplog.at_level(logging.INFO, "trimtab.kernels"):
        kv_attention(random_query(1, 4, 1, 64), [lane], scale=0.1)
    assert "runs on native" in caplog.text
    assert "is torch.float64" in str(native.refuses(random_query(1, 4, 1, 64, torch.float64), [lane], scale=0.1))
    odd = lane_of(random_run(40, group_tokens=10))
    assert "groups of 10 tokens" in str(native.refuses(random_query(1, 4, 1, 64), [odd], scale=0.1))
    monkeypatch.setenv("TRIMTAB_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="groups of 10 tokens"):
        kv_attention(random_query(1, 4, 1, 64), [odd], scale=0.1)


@needs_native
def test_lanes_that_do_not_fit_are_refused() -> None:
    query = random_query(1, 4, 1, 64)
    short = Lane(0, (0, 1), (random_run(40, dtype=torch.float32),), (random_run(39, dtype=torch.float32),))
    with pytest.raises(ConfigError, match="different tokens"):
        native.kv_attention_native(query, [short], scale=0.1)
    far = lane_of(random_run(40, dtype=torch.float32, first_position=1190))
    with pytest.raises(ConfigError, match="past the rotary table"):
        native.kv_attention_native(query, [far], scale=0.1, rope=ROPE)
    with pytest.raises(ConfigError, match="past the rotary table"):
        native.kv_attention_native(query, [far], scale=0.1)


GUARDED = """
import dataclasses
import torch
from guarded import areas, fenced, fenced_outputs
from kv_cases import lane_of, random_query, random_rope, random_run
from trimtab.kernels.kv_attention import Rope, native

def inside(run, at_end):
    some = {name: tensor for name, tensor in run.tensors().items() if tensor.numel()}
    return dataclasses.replace(run, **{name: fenced(tensor, at_end) for name, tensor in some.items()})

plain = random_rope(140, 8)
groups = dict(group_tokens=32), dict(group_channels=8)
kinds = [dict(bits=bits, rank=3, outliers=.03, **group) for bits in (1, 2, 3, 4, 8) for group in groups]
kinds += [dict(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
kinds += [dict(bits=8, coupled=4), dict(bits=10, coupled=4, overrides=2)]
kinds += [dict(bits=4, group_channels=16, hadamard=16, order=True)]
for at_end in (True, False):
    rope = Rope(fenced(plain.cos, at_end), fenced(plain.sin, at_end))
    for kind in kinds:
        for tokens, dim, start, length in ((1, 16, None, 1), (33, 64, None, 1), (40, 24, 100, 1), (37, 80, None, 9)):
            if "hadamard" in kind and dim == 24:
                continue
            keys = inside(random_run(tokens, 2, dim, first_position=start, **kind), at_end)
            values = inside(random_run(tokens, 2, dim, **kind), at_end)
            query = fenced(random_query(1, 4, length, dim, torch.bfloat16), at_end)
            bias = fenced(torch.zeros(1, 4, tokens), at_end)
            with fenced_outputs(at_end):
                out, lse = native.kv_attention_native(query, [lane_of(keys, values)], scale=.1, rope=rope, bias=bias)
            assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        areas.clear()
"""


@pytest.mark.parametrize("isa", library.ISAS)
def test_nothing_outside_the_buffers_is_touched(isa: str) -> None:
    run_guarded(GUARDED, isa)
