"""Sparse outliers: which entries are kept, that they are kept exactly, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors.base import part_from_state
from trimtab.tensors.metric import Metric
from trimtab.tensors.sparse import SparseOutliers

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_selection_keeps_the_largest_entries_exactly(
    out_features: int, in_features: int, fraction: float, dtype: torch.dtype, seed: int
) -> None:
    target = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    part = SparseOutliers.select(target, fraction, dtype=dtype)
    part.check()
    count = round(fraction * target.numel())
    assert part.values.numel() == count
    dense = part.dequantize()
    kept = torch.zeros(target.shape, dtype=torch.bool)
    kept[part.rows(), part.columns.long()] = True
    assert int(kept.sum()) == count
    assert torch.equal(dense[kept], target.float()[kept])
    assert bool((dense[~kept] == 0).all())
    if 0 < count < target.numel():
        assert float(target.abs()[kept].min()) >= float(target.abs()[~kept].max())
    assert part.nbytes == count * (dtype.itemsize + 4) + 4 * (out_features + 1)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from([(), (1,), (16,), (17,), (2, 20)]))
def test_storage_round_trip_and_product(
    out_features: int, in_features: int, fraction: float, leading: tuple[int, ...]
) -> None:
    part = SparseOutliers.select(torch.randn(out_features, in_features), fraction)
    spec, state = json.loads(json.dumps(part.spec())), part.state()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == SparseOutliers.buffers(spec)
    back = part_from_state(spec, state)
    assert back.shape == part.shape == (out_features, in_features)
    assert torch.equal(back.dequantize(), part.dequantize())
    x = torch.randn(*leading, in_features)
    got = back.matmul(x)
    assert got.shape == (*leading, out_features)
    torch.testing.assert_close(got, x @ part.dequantize().t(), rtol=1e-5, atol=1e-5)
    low = back.matmul(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), x.bfloat16().float() @ part.dequantize().t(), rtol=0.05, atol=0.05)


def test_a_metric_moves_the_selection() -> None:
    target = torch.tensor([[3.0, 2.0], [1.0, -2.5]])
    column = torch.tensor([1.0, 4.0])
    kinds = {
        "plain": (None, [[3.0, 0.0], [0.0, -2.5]]),
        "diagonal": (Metric.diagonal(column), [[0.0, 2.0], [0.0, -2.5]]),
        "rows": (Metric.row_column(torch.tensor([1.0, 100.0]), column), [[0.0, 0.0], [1.0, -2.5]]),
        "gram": (Metric.gram(torch.tensor([[1.0, 0.5], [0.5, 4.0]])), [[0.0, 2.0], [0.0, -2.5]]),
    }
    for metric, expected in kinds.values():
        assert SparseOutliers.select(target, 0.5, metric).dequantize().tolist() == expected


def test_weights_count_squared_errors() -> None:
    """Dropping 3 costs 9; dropping 1 of weight 4 costs 4."""
    part = SparseOutliers.select(torch.tensor([[3.0, 1.0]]), 0.5, Metric.diagonal(torch.tensor([1.0, 4.0])))
    assert part.dequantize().tolist() == [[3.0, 0.0]]


@given(st.integers(0, 2**31), st.floats(0, 0.5))
def test_projection_keeps_the_count_and_what_is_outside_the_subset(seed: int, fraction: float) -> None:
    torch.manual_seed(seed)
    part = SparseOutliers.select(torch.randn(6, 10), fraction, dtype=torch.float32)
    target, metric = torch.randn(6, 10), Metric.diagonal(torch.rand(10) + 0.1)
    subset = torch.rand(6, 10) < 0.5
    partial, whole = part.project(target, metric, subset), part.project(target, metric)
    for projected in (partial, whole):
        projected.check()
        assert projected.values.numel() == part.values.numel()
    assert torch.equal(partial.dequantize()[~subset], part.dequantize()[~subset])
    errors = [metric.squared_norm(p.dequantize() - target) for p in (whole, partial, part)]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert errors[1] <= errors[2] * (1 + 1e-6)
    assert torch.equal(part.project(part.dequantize()).dequantize(), part.dequantize())


def test_entries_in_any_order_make_the_same_part() -> None:
    rows, columns, values = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0]), torch.tensor([1.0, 2.0, 3.0])
    part = SparseOutliers.from_entries((4, 5), rows, columns, values)
    part.check()
    assert part.columns.tolist() == [3, 0, 1]
    assert part.offsets.tolist() == [0, 1, 1, 3, 3]
    assert part.dequantize()[2].tolist() == [3.0, 1.0, 0.0, 0.0, 0.0]


def test_refusals() -> None:
    rows, columns, values = torch.tensor([1, 0, 1]), torch.tensor([2, 2, 2]), torch.ones(3)
    with pytest.raises(ConfigError, match=r"\(1, 2\) is given twice"):
        SparseOutliers.from_entries((2, 3), rows, columns, values)
    with pytest.raises(ConfigError, match=r"\(1, 2\) is outside the shape \[2, 2\]"):
        SparseOutliers.from_entries((2, 2), rows[:1], columns[:1], values[:1])
    with pytest.raises(ConfigError, match="one length"):
        SparseOutliers.from_entries((2, 3), rows[:2], columns, values)
    with pytest.raises(ConfigError, match="float64"):
        SparseOutliers.from_entries((2, 3), rows[:1], columns[:1], values[:1].double())
    with pytest.raises(ConfigError, match=r"fraction=1\.5"):
        SparseOutliers.select(torch.ones(2, 2), 1.5)
    with pytest.raises(NumericsError, match="NaN"):
        SparseOutliers.select(torch.tensor([[float("nan"), 1.0]]), 0.5)
    with pytest.raises(NumericsError, match="float16"):
        SparseOutliers.select(torch.tensor([[1e6, 1.0]]), 0.5)


def test_damaged_storage_is_refused() -> None:
    part = SparseOutliers.select(torch.randn(4, 6), 0.5)
    spec, state = part.spec(), part.state()
    for change, message in (({"entries": -1}, "entries"), ({"entries": 25}, "entries"), ({"entries": 11}, r"\[12\]")):
        with pytest.raises(CheckpointError, match=message):
            part_from_state(spec | change, state)
    first_row = int(part.offsets[1])
    for name, index, value, message in (
        ("columns", 0, 6, "columns range"),
        ("columns", 0, -1, "columns range"),
        ("columns", slice(0, 2), 0, "not ascending"),
        ("offsets", 0, 1, "offsets"),
        ("offsets", -1, 99, "offsets"),
        ("offsets", 2, 0, "offsets"),
        ("values", 0, float("inf"), "NaN or infinity"),
    ):
        damaged = {k: v.clone() for k, v in state.items()}
        damaged[name][index] = value
        assert first_row >= 2
        with pytest.raises(CheckpointError, match=message):
            SparseOutliers.from_state(spec, damaged).check()
