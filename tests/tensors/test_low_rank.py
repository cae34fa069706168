"""The truncated SVD is the best there is in every metric, and its factors are stored as they say."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors import low_rank
from trimtab.tensors.base import part_from_state
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.metric import Metric

KINDS = ["identity", "diagonal", "row_column", "gram"]


def metric_of(kind: str, out_features: int, in_features: int) -> Metric:
    """A metric far from the identity: weights over four orders of magnitude."""
    row, column = torch.logspace(-2, 2, out_features), torch.logspace(2, -2, in_features)
    if kind == "gram":
        x = torch.randn(300, in_features) @ torch.randn(in_features, in_features) * column.sqrt()
        return Metric.gram(x.t() @ x / 300)
    made = {"identity": Metric.identity(), "diagonal": Metric.diagonal(column)}
    return made.get(kind) or Metric.row_column(row, column)


def refined(target: Tensor, metric: Metric, left: Tensor, right: Tensor, sweeps: int) -> Tensor:
    """Alternating least squares in the metric: each factor optimal for the other; an independent way to the optimum."""
    d = target.double()
    row = torch.ones(d.shape[0]) if metric.row is None else metric.row
    column = torch.ones(d.shape[1]) if metric.column is None else metric.column
    r = row.double().diag()
    h = (column.diag() if metric.matrix is None else metric.matrix).double()
    left, right = left.double(), right.double()
    for _ in range(sweeps):
        left = d @ h @ right.t() @ torch.linalg.pinv(right @ h @ right.t())
        right = torch.linalg.pinv(left.t() @ r @ left) @ left.t() @ r @ d
    return left @ right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_no_competitor_is_closer(kind: str, rank: int) -> None:
    """Random factors, each polished by alternating least squares, never beat it and come close in the end."""
    target, metric = torch.randn(11, 14), metric_of(kind, 11, 14)
    best = metric.squared_norm(svd(target, rank, metric).dequantize() - target)
    reached = []
    for sweeps in (1, 1, 1, 2, 300):
        rival = refined(target, metric, torch.randn(11, rank), torch.randn(rank, 14), sweeps)
        reached.append(metric.squared_norm(rival - target.double()))
    assert all(error >= best * (1 - 1e-4) for error in reached)
    assert reached[-1] == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_metric_matters(kind: str) -> None:
    target, metric = torch.randn(11, 14), metric_of(kind, 11, 14)
    plain, weighted = (metric.squared_norm(svd(target, 3, m).dequantize() - target) for m in (None, metric))
    assert weighted < 0.9 * plain


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_error_is_the_sum_of_the_dropped_singular_values(
    out_features: int, in_features: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(out_features, in_features)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    target = torch.randn(out_features, in_features)
    dropped = float(torch.linalg.svdvals(target.double())[rank:].square().sum())
    error = float((svd(target, rank).dequantize() - target).double().square().sum())
    assert error == pytest.approx(dropped, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact(kind: str) -> None:
    target = torch.randn(8, 6)
    torch.testing.assert_close(svd(target, 6, metric_of(kind, 8, 6)).dequantize(), target, rtol=1e-4, atol=1e-5)


def test_rank_zero_is_nothing() -> None:
    part = svd(torch.randn(4, 6), 0)
    assert part.nbytes == 0
    assert torch.equal(part.dequantize(), torch.zeros(4, 6))
    assert torch.equal(part.matmul(torch.randn(3, 6)), torch.zeros(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_deterministic_with_a_fixed_sign(kind: str) -> None:
    target, metric = torch.randn(9, 13), metric_of(kind, 9, 13)
    first, second, negated = svd(target, 4, metric), svd(target.clone(), 4, metric), svd(-target, 4, metric)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    torch.testing.assert_close(negated.left, first.left)
    torch.testing.assert_close(negated.right, -first.right)
    peaks = first.left.gather(0, first.left.abs().argmax(dim=0, keepdim=True))
    assert bool((peaks > 0).all())
    torch.testing.assert_close(first.left.norm(dim=0), first.right.norm(dim=1))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scale_of_the_metric_does_not_matter(kind: str) -> None:
    target, metric = torch.randn(9, 13), metric_of(kind, 9, 13)
    if metric.matrix is not None:
        scaled = Metric.gram(metric.matrix * 1e6)
    else:
        assert metric.column is not None
        row = torch.ones(9) if metric.row is None else metric.row
        scaled = Metric.row_column(row * 1e-3, metric.column * 1e6)
    torch.testing.assert_close(
        svd(target, 4, scaled).dequantize(), svd(target, 4, metric).dequantize(), rtol=1e-3, atol=1e-4
    )


def test_dead_rows_and_columns_stay_finite() -> None:
    row, column = torch.rand(9), torch.rand(13)
    row[2], column[5] = 0, 0
    part = svd(torch.randn(9, 13), 3, Metric.row_column(row, column))
    part.check()
    assert float(part.dequantize().abs().max()) < 1e3


def test_randomized_range_finding_is_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    target = (
        torch.linalg.qr(torch.randn(120, 120)).Q
        * torch.logspace(0, -2, 120)
        @ torch.linalg.qr(torch.randn(150, 120)).Q.t()
    )
    exact = svd(target, 12)
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", 100)
    first, second = svd(target, 12), svd(target, 12)
    assert torch.equal(first.left, second.left)
    assert not torch.equal(first.left, exact.left)
    errors = [float((part.dequantize() - target).square().sum()) for part in (exact, first)]
    assert errors[1] <= 1.02 * errors[0]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from((torch.float16, torch.bfloat16, torch.float32)), st.data())
def test_storage_round_trip_and_product(
    out_features: int, in_features: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(out_features, in_features)))
    part = svd(torch.randn(out_features, in_features), rank, dtype=dtype)
    spec, state = json.loads(json.dumps(part.spec())), part.state()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == LowRank.buffers(spec)
    assert part.nbytes == rank * (out_features + in_features) * dtype.itemsize
    back = part_from_state(spec, state)
    assert back.shape == part.shape == (out_features, in_features)
    assert torch.equal(back.dequantize(), part.dequantize())
    x = torch.randn(2, 3, in_features)
    torch.testing.assert_close(part.matmul(x), x @ part.dequantize().t(), rtol=1e-4, atol=1e-5)
    assert part.matmul(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_projection_is_no_worse(kind: str) -> None:
    metric = metric_of(kind, 9, 13)
    part = svd(torch.randn(9, 13), 3, metric)
    target = part.dequantize() + 0.3 * torch.randn(9, 13)
    projected = part.project(target, metric)
    assert projected.rank == 3
    assert metric.squared_norm(projected.dequantize() - target) < metric.squared_norm(part.dequantize() - target)
    torch.testing.assert_close(
        part.project(part.dequantize(), metric).dequantize(), part.dequantize(), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ConfigError, match="subset"):
        part.project(target, subset=torch.ones(9, 13, dtype=torch.bool))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"rank=5 .*\[4, 6\].* 0 \.\. 4"):
        svd(torch.randn(4, 6), 5)
    with pytest.raises(NumericsError, match="NaN"):
        svd(torch.full((4, 6), float("nan")), 2)
    with pytest.raises(NumericsError, match="float16"):
        svd(torch.full((4, 6), 1e12), 2, dtype=torch.float16)
    with pytest.raises(ConfigError, match="do not multiply"):
        LowRank(torch.ones(4, 2), torch.ones(3, 6))
    with pytest.raises(ConfigError, match="float64"):
        LowRank(torch.ones(4, 2).double(), torch.ones(2, 6).double())
    part = svd(torch.randn(4, 6), 2)
    for spec, message in (({"rank": -1}, "rank"), ({"dtype": "int8"}, "int8"), ({"rank": 3}, r"'left'.*\[4, 2\]")):
        with pytest.raises(CheckpointError, match=message):
            part_from_state(part.spec() | spec, part.state())
    damaged = {"left": part.left.clone().fill_(float("nan")), "right": part.right}
    with pytest.raises(CheckpointError, match="'left'"):
        LowRank.from_state(part.spec(), damaged).check()
