"""Tables of levels and nested scales: golden values, bounds, storage, refusals, and mutants."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.packing import pack, unpack
from trimtab.tensors import table
from trimtab.tensors.base import part_from_state
from trimtab.tensors.nested_scales import NestedFormat, NestedScales
from trimtab.tensors.table import LevelTable, TableFormat, normal_float

NF4 = [-1, -0.6961929, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
GOLDEN = {
    4: NF4,
    3: [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1],
    2: [-1, 0, 0.3379152, 1],
}


@st.composite
def nested_formats(draw: st.DrawFn) -> NestedFormat:
    return NestedFormat(
        bits=draw(st.sampled_from((2, 3, 4, 8))),
        block_size=draw(st.sampled_from((1, 5, 16, 256))),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, TableFormat, Tensor | None]:
    """A weight of an odd shape that the groups fill, of many magnitudes, its format, its levels if they are stored."""
    group = draw(st.sampled_from((1, 3, 16, -1)))
    fmt = TableFormat(
        bits=draw(st.sampled_from((2, 3, 4, 8))),
        group_size=group,
        levels=draw(st.sampled_from(("nf", "stored"))),
        scale_dtype=draw(st.sampled_from(("float16", "float32", "bfloat16"))),
        nested=draw(st.none() | nested_formats()),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 4)) * (group if group > 0 else draw(st.integers(1, 9)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-5, 3))
    weight[torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0
    levels = torch.randn(1 << fmt.bits, generator=generator) if fmt.levels == "stored" else None
    return weight, fmt, levels


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def relative_error(weight: Tensor, fmt: TableFormat) -> float:
    found = LevelTable.quantize(weight, fmt).dequantize()
    return float((found - weight).square().sum() / weight.square().sum())


# The table


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_has_the_known_values(bits: int) -> None:
    torch.testing.assert_close(normal_float(bits), torch.tensor(GOLDEN[bits]), rtol=0, atol=6e-8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_is_a_table_of_distinct_levels_around_an_exact_zero(bits: int) -> None:
    levels = normal_float(bits)
    assert levels.shape == (1 << bits,)
    assert bool((levels.diff() > 0).all())
    assert (levels[0], levels[(1 << (bits - 1)) - 1], levels[-1]) == (-1, 0, 1)


def test_gaussian_error_is_the_known_one(gaussian: Tensor) -> None:
    """4.5 bits per weight with float32 scales; half of a percent more or less for the other ways to store scales."""
    assert relative_error(gaussian, TableFormat(scale_dtype="float32")) == pytest.approx(0.00845, rel=0.01)
    assert relative_error(gaussian, TableFormat()) == pytest.approx(0.00845, rel=0.01)
    assert relative_error(gaussian, TableFormat(nested=NestedFormat())) == pytest.approx(0.00845, rel=0.01)


def test_the_golden_error_notices_another_table(gaussian: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "normal_float", lambda bits: torch.linspace(-1, 1, 1 << bits))
    assert relative_error(gaussian, TableFormat()) != pytest.approx(0.00845, rel=0.1)


def test_all_codes_are_used(gaussian: Tensor) -> None:
    for bits in (2, 3, 4, 8):
        assert len(LevelTable.quantize(gaussian[:64], TableFormat(bits=bits)).codes().unique()) == 1 << bits


def test_bits_per_weight_are_those_of_the_papers(gaussian: Tensor) -> None:
    """QLoRA: 4.5 without and 4.127 with double quantization, blocks of 64 and 256; one offset per matrix beside it."""
    for fmt, bits in (
        (TableFormat(scale_dtype="float32"), 4.5),
        (TableFormat(), 4.25),
        (TableFormat(nested=NestedFormat()), 4 + 8 / 64 + 32 / (64 * 256)),
        (TableFormat(bits=3, nested=NestedFormat(bits=4, block_size=16, dtype="bfloat16")), 3 + 4 / 64 + 1 / 64),
    ):
        offset = 0 if fmt.nested is None else 4
        assert LevelTable.quantize(gaussian, fmt).nbytes == gaussian.numel() * bits / 8 + offset


# Codes


def test_zero_and_both_ends_are_exact() -> None:
    weight = torch.tensor([[-2.0, 0.0, 0.5, 2.0], [0.25, 0.0, -0.125, -0.25]])
    found = LevelTable.quantize(weight, TableFormat(bits=2, group_size=-1)).dequantize()
    assert torch.equal(found[0, [0, 1, 3]], weight[0, [0, 1, 3]])
    assert found[1].tolist() == [0.25, 0.0, -0.25, -0.25]  # -0.5 is midway between -1 and 0


def test_a_value_on_a_boundary_takes_the_lower_level() -> None:
    levels = torch.tensor([-1.0, -0.5, 0.0, 1.0])
    fmt = TableFormat(bits=2, group_size=-1, levels="stored")
    found = LevelTable.quantize(torch.tensor([[-0.75, -0.25, 0.5, 1.0]]), fmt, levels)
    assert found.codes().tolist() == [[0, 1, 2, 3]]


@given(cases())
def test_codes_are_nearest_for_the_scales_as_stored(case: tuple[Tensor, TableFormat, Tensor | None]) -> None:
    weight, fmt, levels = case
    part = LevelTable.quantize(weight, fmt, levels)
    scales = part.scales.double().repeat_interleave(weight.shape[1] // part.scales.shape[1], dim=1)
    reachable = scales[..., None] * part.levels.double()
    best = (reachable - weight.double()[..., None]).abs().amin(dim=-1)
    error = (part.dequantize().double() - weight.double()).abs()
    assert bool((error <= best + 1e-6 * scales).all())


def test_codes_follow_the_expanded_scale_and_not_the_exact_one(gaussian: Tensor) -> None:
    """LQ-LoRA's fourth step; with scales of 2 bits, codes for the exact scale would be far off."""
    fmt = TableFormat(nested=NestedFormat(bits=2, block_size=16))
    part = LevelTable.quantize(gaussian[:64], fmt)
    exact = LevelTable.quantize(gaussian[:64], TableFormat(scale_dtype="float32"))
    careless = replace(part, packed=exact.packed).dequantize()
    error, worse = ((found - gaussian[:64]).square().mean() for found in (part.dequantize(), careless))
    assert float(error) < 0.9 * float(worse)


@given(cases())
def test_projection_of_the_weight_itself_changes_nothing(case: tuple[Tensor, TableFormat, Tensor | None]) -> None:
    part = LevelTable.quantize(*case)
    assert torch.equal(part.project(part.dequantize()).dequantize(), part.dequantize())


@pytest.mark.parametrize("levels", ["nf", "stored"])
def test_differ_takes_the_second_nearest_level(levels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(8, generator=generator) if levels == "stored" else None  # in no order
    fmt = TableFormat(bits=3, group_size=16, levels=levels)  # type: ignore[arg-type]
    weight = torch.randn(6, 32, generator=generator)
    part = LevelTable.quantize(weight, fmt, own)
    distance = (weight[..., None] - part.scales.float().repeat_interleave(16, 1)[..., None] * part.levels).abs()
    order = distance.argsort(dim=-1)
    assert torch.equal(part.codes().long(), order[..., 0])
    assert torch.equal(part.project(weight, differ=True).codes().long(), order[..., 1])


@given(cases(), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_matmul_is_the_product_with_the_dense_weight(
    case: tuple[Tensor, TableFormat, Tensor | None], dtype: torch.dtype
) -> None:
    weight, fmt, levels = case
    part = LevelTable.quantize(weight / weight.abs().max().clamp(min=1e-30), fmt, levels)
    x = torch.randn(2, 3, part.shape[1]).to(dtype)
    got = part.matmul(x)
    assert (got.dtype, got.shape) == (dtype, (2, 3, part.shape[0]))
    dense = part.dequantize(torch.float64)
    scale = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=1)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert bool(((got.double() - x.double() @ dense.T).abs() <= tolerance * scale + 1e-30).all())


def test_nested_scales_are_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = LevelTable.quantize(torch.randn(4, 64), TableFormat(nested=NestedFormat()))
    expanded: list[int] = []
    right = NestedScales.values
    monkeypatch.setattr(NestedScales, "values", lambda self: expanded.append(1) or right(self))
    for _ in range(3):
        part.matmul(torch.randn(1, 64))
    assert len(expanded) == 1


# Nested scales


def bound_holds(scales: Tensor, fmt: NestedFormat) -> bool:
    """|a~ - a| <= A / (2 (2^b0 - 1)) and a~ >= off, up to the rounding of float32 sums."""
    found = NestedScales.quantize(scales, fmt)
    flat, back = scales.flatten().double(), found.values().flatten().double()
    offset, block = flat.min(), torch.arange(len(flat)) // fmt.block_size
    width = torch.stack([(flat[block == b] - offset).max() for b in range(int(block[-1]) + 1)])[block]
    slack = 1e-6 * flat.max()
    saturated = width * torch.finfo(fmt.torch_dtype).eps / 2  # a maximum may have been rounded down
    half_step = width * (1 + torch.finfo(fmt.torch_dtype).eps) / (2 * fmt.last_code)
    near = (back - flat).abs() <= torch.maximum(half_step, saturated) + slack
    return bool(near.all() and (back >= offset - slack).all())


@given(nested_formats(), st.integers(0, 2**31))
def test_expanded_scales_are_within_half_a_step_and_not_below_the_offset(fmt: NestedFormat, seed: int) -> None:
    assert bound_holds(torch.rand(7, 11, generator=torch.Generator().manual_seed(seed)) + 0.2, fmt)


@pytest.mark.parametrize("broken", ["no offset", "one block"])
def test_the_bound_notices_a_broken_variant(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    fmt = NestedFormat(bits=3, block_size=16)
    scales = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 8)[:, None] + 0.2
    assert bound_holds(scales, fmt)
    right = NestedScales.quantize

    def quantize(values: Tensor, fmt: NestedFormat) -> NestedScales:
        if broken == "no offset":  # codes of a instead of a - off
            found = right(torch.cat([values, torch.zeros(1, 16)]), fmt)
            codes = pack(unpack(found.codes, fmt.bits, 144)[:, :128], fmt.bits)
            return replace(found, shape=(8, 16), codes=codes, maxima=found.maxima[:8])
        whole = right(values, replace(fmt, block_size=values.numel()))
        return replace(whole, format=fmt, maxima=whole.maxima.expand(8))

    monkeypatch.setattr(NestedScales, "quantize", quantize)
    assert not bound_holds(scales, fmt)


def test_equal_scales_and_zeros_are_exact() -> None:
    """A = 0: all scales are the offset."""
    for value in (0.0, 0.7):
        scales = torch.full((3, 5), value)
        assert torch.equal(NestedScales.quantize(scales, NestedFormat(bits=2)).values(), scales)


def test_a_maximum_rounded_down_saturates() -> None:
    scales = torch.tensor([[0.0, 1.0 + 2.0**-9]])  # bfloat16 rounds the second to 1
    found = NestedScales.quantize(scales, NestedFormat(bits=8, dtype="bfloat16"))
    assert found.values().tolist() == [[0.0, 1.0]]
    assert unpack(found.codes, 8, 2).tolist() == [[0, 255]]


def test_overflow_of_a_maximum_names_the_way_out() -> None:
    with pytest.raises(NumericsError, match=r"1e\+05, is beyond float16.*float32"):
        NestedScales.quantize(torch.tensor([[0.0, 1e5]]), NestedFormat(dtype="float16"))


# Storage and refusals


@given(cases())
def test_storage_round_trip(case: tuple[Tensor, TableFormat, Tensor | None]) -> None:
    part = LevelTable.quantize(*case)
    spec, state = json.loads(json.dumps(part.spec())), part.state()
    wanted = LevelTable.buffers(spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == wanted
    assert part.nbytes == sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
    back = part_from_state(spec, state)
    assert isinstance(back, LevelTable)
    back.check()
    assert back.spec() == part.spec()
    assert torch.equal(back.dequantize(), part.dequantize())
    assert back.packed.data_ptr() == part.packed.data_ptr()


def test_damaged_storage_is_refused() -> None:
    part = LevelTable.quantize(torch.randn(4, 64), TableFormat(nested=NestedFormat(block_size=2)))
    spec, state = part.spec(), part.state()
    for broken_spec, broken_state, message in (
        (spec | {"bits": 5}, state, "bits"),
        (spec | {"group_size": 48}, state, "does not divide"),
        (spec | {"levels": "fp4"}, state, "levels"),
        (spec | {"nested": {"bits": 5}}, state, "nested"),
        (spec | {"nested": None}, state, "unexpected buffers"),
        (spec, state | {"scale_maxima": state["scale_maxima"][:1]}, "scale_maxima"),
    ):
        with pytest.raises(CheckpointError, match=message):
            part_from_state(broken_spec, broken_state)
    with pytest.raises(CheckpointError, match="'scale_maxima' is negative or not finite"):
        LevelTable.from_state(spec, state | {"scale_maxima": -state["scale_maxima"]}).check()
    plain = LevelTable.quantize(torch.randn(4, 64), TableFormat())
    with pytest.raises(CheckpointError, match=r"scales\[0, 0\] = -"):
        LevelTable.from_state(plain.spec(), plain.state() | {"scales": -plain.scales}).check()


def test_what_cannot_be_quantized_is_refused() -> None:
    weight = torch.randn(2, 64)
    with pytest.raises(ConfigError, match="group_size=48 does not divide 64"):
        LevelTable.quantize(weight, TableFormat(group_size=48))
    with pytest.raises(ConfigError, match="group_size=0"):
        TableFormat(group_size=0)
    with pytest.raises(ConfigError, match="exactly if the format stores one"):
        LevelTable.quantize(weight, TableFormat(levels="stored"))
    with pytest.raises(ConfigError, match=r"want float32 \[4\]"):
        LevelTable.quantize(weight, TableFormat(bits=2, levels="stored"), torch.zeros(3))
    with pytest.raises(NumericsError, match=r"7e\+05, is beyond float16.*bfloat16"):
        LevelTable.quantize(torch.full((2, 64), 7e5), TableFormat())
    weight[1, 3] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinite"):
        LevelTable.quantize(weight, TableFormat())
