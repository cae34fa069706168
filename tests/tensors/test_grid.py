"""Grids: the formulas, the bounds on the error, storage and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors.base import part_from_state
from trimtab.tensors.grid import (
    MSE_SEARCH,
    ClipSearch,
    GridFormat,
    GroupGrid,
    column_codes,
    column_values,
    dequantize_codes,
    grid_parameters,
    group_parameters,
    quantize_codes,
)


def expand_parameters(parameters: torch.Tensor, fmt: GridFormat, shape: tuple[int, int]) -> torch.Tensor:
    """One parameter per group -> one per weight."""
    return parameters.repeat_interleave(fmt.group_length(shape), dim=1 if fmt.axis == "in" else 0)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def formats(draw: st.DrawFn) -> GridFormat:
    return GridFormat(
        bits=draw(st.sampled_from((2, 3, 4, 8))),
        group_size=draw(st.sampled_from((1, 3, 8, 16, -1))),
        symmetric=draw(st.booleans()),
        axis=draw(st.sampled_from(("in", "out"))),
        scale_dtype=draw(st.sampled_from(("float16", "float32", "bfloat16"))),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, GridFormat]:
    """A weight of an odd shape that the format's groups fill, of any floating dtype and many magnitudes."""
    fmt = draw(formats())
    grouped = draw(st.integers(1, 4)) * (fmt.group_size if fmt.group_size > 0 else draw(st.integers(1, 9)))
    other = draw(st.integers(1, 9))
    shape = (other, grouped) if fmt.axis == "in" else (grouped, other)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-7, 3))
    weight = weight + draw(st.sampled_from((0.0, 1.0))) * weight.abs().max()
    weight[torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0
    return weight.to(draw(st.sampled_from(DTYPES))), fmt


GOLDEN = [  # bits, group size, symmetric, relative squared error on Gaussian weights
    (4, 128, True, 0.01226),
    (4, 32, True, 0.00899),
    (4, 128, False, 0.01008),
    (3, 128, True, 0.05621),
    (3, 128, False, 0.04633),
    (2, 128, True, 0.302),
    (2, 128, False, 0.252),
]


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "golden"), GOLDEN)
def test_gaussian_error_is_the_known_one(
    gaussian: torch.Tensor, bits: int, group_size: int, symmetric: bool, golden: float
) -> None:
    fmt = GridFormat(bits=bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    error = (GroupGrid.quantize(gaussian, fmt).dequantize() - gaussian).square().sum() / gaussian.square().sum()
    assert float(error) == pytest.approx(golden, rel=0.01)


def test_symmetric_codes_by_hand() -> None:
    """s = 1 / 1.5 as float16; -1 is at -1.5 steps and goes to the even -2, stored as code 0."""
    grid = GroupGrid.quantize(torch.tensor([[-1.0, 0.5, 0.25, 0.75]]), GridFormat(bits=2, group_size=4))
    scale = torch.tensor(2 / 3, dtype=torch.float16)
    assert torch.equal(grid.scales, scale.reshape(1, 1))
    assert grid.codes().tolist() == [[0, 3, 2, 3]]
    assert torch.equal(grid.dequantize(), scale.float() * torch.tensor([[-2.0, 1.0, 0.0, 1.0]]))


def test_asymmetric_codes_by_hand() -> None:
    """Range [-1, 2] in 15 steps of 0.2: zero is code 5."""
    fmt = GridFormat(bits=4, group_size=4, symmetric=False, scale_dtype="float32")
    grid = GroupGrid.quantize(torch.tensor([[-1.0, 2.0, 0.0, 0.33]]), fmt)
    assert grid.zeros is not None
    assert grid.zeros.tolist() == [[5]]
    assert grid.codes().tolist() == [[0, 15, 5, 7]]


def test_zeros_and_codes_follow_the_scale_as_stored() -> None:
    """A bfloat16 scale is off by up to half a code in 256: at 8 bits many zeros differ from the exact scale's."""
    weight = torch.rand(200, 64) - torch.rand(200, 1)
    fmt = GridFormat(bits=8, symmetric=False, scale_dtype="bfloat16")
    low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    exact = (high - low) / 255
    stored = exact.bfloat16().float()
    grid = GroupGrid.quantize(weight, fmt)
    assert grid.zeros is not None
    assert torch.equal(grid.zeros.float(), torch.round(-low / stored).clamp(0, 255))
    assert bool((grid.zeros.float() != torch.round(-low / exact)).any())
    codes = (torch.round(weight / stored) + grid.zeros.float()).clamp(0, 255)
    assert torch.equal(grid.codes().float(), codes)


def test_ties_go_to_even() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    codes = column_codes(values, torch.ones(6), None, GridFormat(bits=4))
    assert (codes.int() - 8).tolist() == [0, 2, 2, 0, -2, -2]


@given(cases())
@settings(max_examples=150)
def test_error_is_at_most_half_a_step_inside_the_range(case: tuple[torch.Tensor, GridFormat]) -> None:
    weight, fmt = case
    grid = GroupGrid.quantize(weight, fmt)
    scales = expand_parameters(grid.scales, fmt, grid.shape).double()
    ends = (torch.full(grid.shape, code) for code in (0, fmt.levels - 1))
    lowest, highest = (dequantize_codes(end, grid.scales, grid.zeros, fmt).double() for end in ends)
    w = weight.double()
    inside = (w >= lowest - scales / 2) & (w <= highest + scales / 2)
    error = (grid.dequantize().double() - w).abs()
    assert bool((error[inside] <= scales[inside] / 2 * (1 + 1e-4)).all())
    # Outside, a weight takes the nearest end. At most half a step is lost to the symmetric grid's missing positive code
    # or to the rounded zero, and another to the rounding of the scale, once per code (float16 scales may be subnormal).
    rounding = (scales * torch.finfo(grid.scales.dtype).eps).clamp(min=2.0**-24 if fmt.scale_dtype == "float16" else 0)
    assert bool((error <= 1.001 * scales + fmt.levels * rounding).all())


@given(cases())
def test_codes_of_a_dequantized_grid_are_the_same_codes(case: tuple[torch.Tensor, GridFormat]) -> None:
    weight, fmt = case
    grid = GroupGrid.quantize(weight, fmt)
    again = grid.project(grid.dequantize())
    assert torch.equal(again.packed, grid.packed)
    assert torch.equal(again.dequantize(), grid.dequantize())


@given(cases())
def test_storage_round_trip(case: tuple[torch.Tensor, GridFormat]) -> None:
    grid = GroupGrid.quantize(*case)
    spec, state = json.loads(json.dumps(grid.spec())), grid.state()
    wanted = GroupGrid.buffers(spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == wanted
    assert all(t.is_contiguous() for t in state.values())
    assert grid.nbytes == sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
    back = part_from_state(spec, state)
    assert isinstance(back, GroupGrid)
    back.check()
    assert back.shape == grid.shape == tuple(case[0].shape)
    assert back.spec() == grid.spec()
    assert torch.equal(back.dequantize(), grid.dequantize())
    assert back.packed.data_ptr() == grid.packed.data_ptr()


@given(cases(), st.sampled_from(DTYPES), st.sampled_from([(), (1,), (3,), (2, 5)]))
def test_matmul_is_the_product_with_the_dense_weight(
    case: tuple[torch.Tensor, GridFormat], dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    weight = case[0].float()
    grid = GroupGrid.quantize(weight / weight.abs().max().clamp(min=1e-30), case[1])
    x = torch.randn(*leading, grid.shape[1]).to(dtype)
    got = grid.matmul(x)
    assert got.dtype == dtype
    assert got.shape == (*leading, grid.shape[0])
    exact = x.double() @ grid.dequantize(torch.float64).t()
    scale = x.double().norm(dim=-1, keepdim=True) * grid.dequantize(torch.float64).norm(dim=1)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert bool(((got.double() - exact).abs() <= tolerance * scale + 1e-30).all())


@given(cases())
def test_axis_out_is_axis_in_of_the_transposed_weight(case: tuple[torch.Tensor, GridFormat]) -> None:
    weight, fmt = case
    other = GridFormat(**{**fmt.to_dict(), "axis": "out" if fmt.axis == "in" else "in"})
    grid, turned = GroupGrid.quantize(weight, fmt), GroupGrid.quantize(weight.t(), other)
    assert torch.equal(grid.scales, turned.scales.t())
    assert torch.equal(grid.dequantize(), turned.dequantize().t())


@given(cases(), st.integers(0, 2**31))
def test_projection_changes_the_subset_only_and_is_no_worse(case: tuple[torch.Tensor, GridFormat], seed: int) -> None:
    weight, fmt = case
    grid = GroupGrid.quantize(weight, fmt)
    generator = torch.Generator().manual_seed(seed)
    spread = weight.double().abs().mean()
    target = weight.double() + spread * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    subset = torch.rand(weight.shape, generator=generator) < 0.5
    projected = grid.project(target, subset=subset)
    assert torch.equal(projected.codes()[~subset], grid.codes()[~subset])
    assert torch.equal(projected.scales, grid.scales)
    whole = grid.project(target)
    assert torch.equal(projected.codes()[subset], whole.codes()[subset])
    before, after = (grid.dequantize().double() - target).abs(), (whole.dequantize().double() - target).abs()
    assert bool((after <= before * (1 + 1e-6) + 1e-6 * spread).all())


@given(cases())
def test_asymmetric_zero_is_exact(case: tuple[torch.Tensor, GridFormat]) -> None:
    weight, fmt = case
    grid = GroupGrid.quantize(weight, fmt)
    assert bool((grid.dequantize()[weight == 0] == 0).all())


@given(st.sampled_from((2, 3, 4, 8)), st.booleans(), st.sampled_from(("float16", "float32", "bfloat16")))
def test_a_zero_weight_stays_zero(bits: int, symmetric: bool, scale_dtype: str) -> None:
    fmt = GridFormat.from_options({"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype, "group_size": 8})
    grid = GroupGrid.quantize(torch.zeros(3, 16), fmt)
    grid.check()
    assert torch.equal(grid.dequantize(), torch.zeros(3, 16))
    assert bool((grid.scales == torch.finfo(fmt.torch_scale_dtype).eps).all())


def test_one_sided_groups_put_zero_at_the_end() -> None:
    fmt = GridFormat(bits=4, group_size=-1, symmetric=False)
    positive = torch.rand(3, 20) + 1
    for weight, zero in ((positive, 0), (-positive, 15)):
        _, zeros = grid_parameters(weight, fmt)
        assert zeros is not None
        assert zeros.unique().tolist() == [zero]


@given(cases(), st.sampled_from((1.0, 2.0, 2.4)))
def test_search_never_loses_to_the_full_range(case: tuple[torch.Tensor, GridFormat], norm: float) -> None:
    weight, fmt = case[0].double(), case[1]
    fmt = GridFormat(**{**fmt.to_dict(), "axis": "in"})
    if fmt.group_size > 0 and weight.shape[1] % fmt.group_size:
        weight = weight.t()
    importance = torch.rand(weight.shape[1])
    length = fmt.group_length((weight.shape[0], weight.shape[1]))

    def group_errors(grid: GroupGrid, weights: torch.Tensor) -> torch.Tensor:
        error = (grid.dequantize() - weight.float()).abs().pow(norm) * weights
        return error.reshape(-1, length).sum(dim=1)

    search = ClipSearch(norm=norm, max_shrink=0.6, grid=20)
    plain = GroupGrid.quantize(weight, fmt)
    for weights in (None, importance):
        searched = GroupGrid.quantize(weight, fmt, clip=search, importance=weights)
        shown = torch.ones(weight.shape[1]) if weights is None else weights
        before, after = group_errors(plain, shown), group_errors(searched, shown)
        assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (3, False), (4, True)])
def test_search_helps_on_gaussian_weights(gaussian: torch.Tensor, bits: int, symmetric: bool) -> None:
    fmt = GridFormat(bits=bits, symmetric=symmetric)  # type: ignore[arg-type]
    weight = gaussian[:64]
    plain, searched = (
        float((GroupGrid.quantize(weight, fmt, clip=clip).dequantize() - weight).square().mean())
        for clip in (None, MSE_SEARCH)
    )
    assert searched < 0.95 * plain


def test_importance_decides_whose_error_counts() -> None:
    """With an outlier that does not matter, the range shrinks to what does; with one that does, it stays."""
    weight = torch.randn(16, 64)
    weight[:, 5] = 6.0
    fmt = GridFormat(bits=3)
    others = torch.arange(64) != 5
    ignored, mattering = torch.ones(64), torch.ones(64)
    ignored[5], mattering[5] = 0.0, 1e6
    low, high = (GroupGrid.quantize(weight, fmt, importance=weights).dequantize() for weights in (ignored, mattering))
    assert float((low - weight)[:, others].square().mean()) < 0.5 * float((high - weight)[:, others].square().mean())
    assert float((high - weight)[:, 5].abs().max()) < float((low - weight)[:, 5].abs().max())


@given(cases())
@settings(max_examples=50)
def test_column_helpers_agree_with_the_whole_matrix(case: tuple[torch.Tensor, GridFormat]) -> None:
    """What a sequential method does column by column, with parameters taken group by group, is plain rounding."""
    weight, fmt = case
    if fmt.axis == "out":
        weight, fmt = weight.t(), GridFormat(**{**fmt.to_dict(), "axis": "in"})
    grid = GroupGrid.quantize(weight, fmt)
    length = fmt.group_length(grid.shape)
    for column in range(weight.shape[1]):
        group = column // length
        scales, zeros = group_parameters(weight[:, group * length : (group + 1) * length], fmt)
        codes = column_codes(weight[:, column], scales, zeros, fmt)
        assert torch.equal(codes, grid.codes()[:, column])
        assert torch.equal(column_values(codes, scales, zeros, fmt), grid.dequantize()[:, column])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 6e-8, 1e-3, 1e4])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_extreme_magnitudes_keep_the_bound(magnitude: float, scale_dtype: str) -> None:
    fmt = GridFormat.from_options({"bits": 4, "group_size": 8, "scale_dtype": scale_dtype})
    weight = torch.randn(4, 16) * magnitude
    grid = GroupGrid.quantize(weight, fmt)
    grid.check()
    scales = expand_parameters(grid.scales, fmt, (4, 16)).float()
    assert bool(((grid.dequantize() - weight).abs() <= 0.6 * scales).all())


def test_group_of_the_whole_axis() -> None:
    weight = torch.randn(5, 30)
    whole, thirty = (GroupGrid.quantize(weight, GridFormat(bits=3, group_size=g)) for g in (-1, 30))
    assert whole.scales.shape == (5, 1)
    assert torch.equal(whole.dequantize(), thirty.dequantize())


def test_more_bits_or_smaller_groups_are_better(gaussian: torch.Tensor) -> None:
    def error(**options: object) -> float:
        weight = gaussian[:64]
        return float(
            (GroupGrid.quantize(weight, GridFormat.from_options(options)).dequantize() - weight).square().mean()
        )

    assert error(bits=2) > error(bits=3) > error(bits=4) > error(bits=8)
    assert error(group_size=-1) > error(group_size=128) > error(group_size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"axis": "both"}, "axis='both'"),
        ({"scale_dtype": "float8"}, "scale_dtype='float8'"),
    ],
)
def test_formats_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridFormat(**options)  # type: ignore[arg-type]


def test_group_size_must_divide_the_axis() -> None:
    with pytest.raises(ConfigError, match=r"group_size=128 does not divide 704.*\[3, 704\].*16, 32, 64"):
        GroupGrid.quantize(torch.randn(3, 704), GridFormat(group_size=128))
    with pytest.raises(ConfigError, match="'out' axis"):
        GroupGrid.quantize(torch.randn(3, 704), GridFormat(group_size=64, axis="out"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = torch.randn(2, 64)
    weight[1, 7] = bad
    with pytest.raises(NumericsError, match=r"1 NaN and 0 infinite|0 NaN and 1 infinite"):
        GroupGrid.quantize(weight, GridFormat())
    grid = GroupGrid.quantize(torch.randn(2, 64), GridFormat())
    with pytest.raises(NumericsError):
        grid.project(weight)


def test_scale_overflow_names_the_way_out() -> None:
    weight = torch.full((2, 64), 5e5)
    with pytest.raises(NumericsError, match=r"beyond float16.*bfloat16"):
        GroupGrid.quantize(weight, GridFormat())
    wide = GroupGrid.quantize(weight, GridFormat(scale_dtype="bfloat16"))
    assert float((wide.dequantize() / weight - 1).abs().max()) < 0.1


@pytest.mark.parametrize("codes", [torch.tensor([[16, 0]]), torch.tensor([[-1, 0]])])
def test_codes_out_of_range_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="4 bits hold 0 to 15"):
        GroupGrid.from_codes(codes, torch.ones(1, 1).half(), None, GridFormat(group_size=2))


def test_parameters_that_do_not_fit_are_refused() -> None:
    codes, fmt = torch.zeros(2, 4, dtype=torch.uint8), GridFormat(group_size=2)
    scales = torch.ones(2, 2).half()
    with pytest.raises(ConfigError, match=r"scales of shape \[1, 2\]"):
        GroupGrid.from_codes(codes, scales[:1], None, fmt)
    with pytest.raises(ConfigError, match="float16"):
        GroupGrid.from_codes(codes, scales.float(), None, fmt)
    with pytest.raises(ConfigError, match="zeros"):
        GroupGrid.from_codes(codes, scales, torch.zeros(2, 2, dtype=torch.uint8), fmt)
    with pytest.raises(ConfigError, match="matrix"):
        quantize_codes(torch.zeros(4), scales, None, fmt)
    with pytest.raises(ConfigError, match=r"shape \[0, 4\]"):
        GroupGrid.quantize(torch.zeros(0, 4), fmt)


def test_damaged_storage_is_refused() -> None:
    grid = GroupGrid.quantize(torch.randn(4, 64), GridFormat(symmetric=False))
    spec, state = grid.spec(), grid.state()
    for broken_spec, broken_state, message in (
        (spec | {"bits": 5}, state, "bits"),
        (spec | {"shape": [4]}, state, "shape"),
        (spec | {"group_size": 48}, state, "does not divide"),
        (spec | {"speed": 3}, state, "speed"),
        (spec | {"kind": "gird"}, state, "Did you mean 'grid'"),
        (spec, {k: v for k, v in state.items() if k != "scales"}, "'scales' is missing"),
        (spec, state | {"extra": state["scales"]}, "extra"),
        (spec, state | {"scales": state["scales"].float()}, "float32"),
        (spec, state | {"codes": state["codes"][:2]}, r"'codes'.*\[2, "),
    ):
        with pytest.raises(CheckpointError, match=message):
            part_from_state(broken_spec, broken_state)
    for name, value, message in (
        ("scales", float("nan"), "scales"),
        ("scales", -1.0, "scales"),
        ("zeros", 16, "zero point is 16"),
    ):
        damaged = {k: v.clone() for k, v in state.items()}
        damaged[name][2, 0] = value
        with pytest.raises(CheckpointError, match=message):
            GroupGrid.from_state(spec, damaged).check()
