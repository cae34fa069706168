"""Metrics: the norms against their definitions, whitening, and the factor that sequential quantization needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.metric import WHITEN_RIDGE, Metric


def correlated(size: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """A Gram matrix with correlated inputs and a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) @ torch.randn(size, size, generator=generator)
    x[:, ::5] *= 10
    return x.t() @ x / tokens


def some_metrics(out_features: int, in_features: int) -> dict[str, Metric]:
    return {
        "identity": Metric.identity(),
        "diagonal": Metric.diagonal(torch.rand(in_features) + 0.1),
        "row_column": Metric.row_column(torch.rand(out_features) + 0.1, torch.rand(in_features) + 0.1),
        "gram": Metric.gram(correlated(in_features)),
    }


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_norms_are_the_traces_they_stand_for(out_features: int, in_features: int, seed: int) -> None:
    torch.manual_seed(seed)
    error = torch.randn(out_features, in_features, dtype=torch.float64)
    for metric in some_metrics(out_features, in_features).values():
        rows = torch.ones(out_features) if metric.row is None else metric.row
        columns = torch.ones(in_features) if metric.column is None else metric.column
        h = (columns.diag() if metric.matrix is None else metric.matrix).double()
        expected = float(torch.trace(rows.double().diag() @ error @ h @ error.t()))
        assert metric.squared_norm(error) == pytest.approx(expected, rel=1e-9)
        assert metric.weighted_norm(error) ** 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "row_column", "gram"])
def test_whitening_turns_the_norm_into_frobenius_and_back(kind: str) -> None:
    metric = some_metrics(7, 12)[kind]
    error = torch.randn(7, 12, dtype=torch.float64)
    white = metric.whiten(error)
    expected = metric.squared_norm(error)
    if metric.matrix is not None:
        expected += WHITEN_RIDGE * float(metric.matrix.diagonal().mean()) * float(error.square().sum())
    assert float(white.square().sum()) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(metric.unwhiten(white), error, rtol=1e-8, atol=1e-8)
    left, right = torch.randn(7, 3), torch.randn(3, 12)
    product = metric.unwhiten_left(left) @ metric.unwhiten_right(right)
    torch.testing.assert_close(product, metric.unwhiten(left @ right), rtol=1e-5, atol=1e-5)


def test_relative_error_is_a_ratio_of_squares() -> None:
    metric = Metric.gram(correlated(12))
    weight = torch.randn(5, 12)
    assert metric.relative_error(weight, weight * 0.9) == pytest.approx(0.01, rel=1e-4)
    assert metric.relative_error(weight, weight) == 0
    assert metric.relative_error(torch.zeros(5, 12), torch.zeros(5, 12)) == 0
    assert metric.relative_error(torch.zeros(5, 12), weight) == float("inf")


def test_dead_rows_and_columns_do_not_divide_by_zero() -> None:
    metric = Metric.row_column(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0, 3.0]))
    assert bool(torch.isfinite(metric.unwhiten(metric.whiten(torch.randn(2, 3)))).all())
    for dead in (Metric.diagonal(torch.zeros(3)), Metric.gram(torch.zeros(3, 3))):
        error = torch.randn(2, 3, dtype=torch.float64)
        assert dead.squared_norm(error) == 0
        torch.testing.assert_close(dead.unwhiten(dead.whiten(error)), error)


def test_rank_deficient_gram_can_be_whitened() -> None:
    x = torch.randn(5, 32)
    metric = Metric.gram(x.t() @ x)
    error = torch.randn(4, 32, dtype=torch.float64)
    torch.testing.assert_close(metric.unwhiten(metric.whiten(error)), error, rtol=1e-6, atol=1e-6)


def test_column_order_is_by_weight_and_stable() -> None:
    metric = Metric.diagonal(torch.tensor([1.0, 3.0, 1.0, 5.0, 3.0]))
    assert metric.column_order().tolist() == [3, 1, 4, 0, 2]
    ties = Metric.diagonal(torch.arange(300).remainder(2).float()).column_order()
    assert ties.tolist() == [*range(1, 300, 2), *range(0, 300, 2)]
    assert Metric.identity().column_order(3).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="in_features"):
        Metric.identity().column_order()


def test_permuted_metric_gives_permuted_weights_the_same_norm() -> None:
    order = torch.randperm(12)
    error = torch.randn(7, 12)
    for metric in some_metrics(7, 12).values():
        moved = metric.permuted(order).squared_norm(error[:, order])
        assert moved == pytest.approx(metric.squared_norm(error), rel=1e-9)


@pytest.mark.parametrize("damp", [0.0, 0.01, 0.5])
def test_inverse_cholesky_factors_the_damped_inverse(damp: float) -> None:
    h = correlated(40)
    found = Metric.gram(h).inverse_cholesky(damp)
    damped = h.double() + damp * h.double().diagonal().mean() * torch.eye(40)
    upper = found.factor.double()
    assert found.damping == damp
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    inverse = damped.inverse()
    assert float((upper.t() @ upper - inverse).norm()) < 1e-6 * float(inverse.norm())


def test_inverse_cholesky_of_a_diagonal_is_its_inverse_root() -> None:
    column = torch.tensor([4.0, 1.0, 16.0])
    for metric in (Metric.diagonal(column), Metric.gram(column.diag()), Metric.row_column(torch.ones(2), column)):
        torch.testing.assert_close(metric.inverse_cholesky(0.0).factor, column.rsqrt().diag())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_of_the_gram_does_not_change_ratios_in_the_factor(scale: float) -> None:
    h = correlated(20)
    plain, scaled = (Metric.gram(m).inverse_cholesky(0.01).factor for m in (h, h * scale))
    torch.testing.assert_close(
        plain / plain.diagonal()[:, None], scaled / scaled.diagonal()[:, None], rtol=1e-4, atol=1e-5
    )


def test_dead_columns_are_named_and_decoupled() -> None:
    h = correlated(10)
    h[3], h[:, 3] = 0, 0
    found = Metric.gram(h).inverse_cholesky(0.01)
    assert found.dead.nonzero().tolist() == [[3]]
    others = found.factor.clone()
    others[3, 3] = 0
    assert bool((others[3] == 0).all())
    assert bool((others[:, 3] == 0).all())
    everything = Metric.gram(torch.zeros(4, 4)).inverse_cholesky(0.01)
    torch.testing.assert_close(everything.factor, torch.eye(4))


def test_damping_escalates_and_is_reported() -> None:
    """-0.05 is the least eigenvalue and 1 the mean diagonal: 0.001 and 0.01 fail, 0.1 serves."""
    rotated = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    eigenvalues = torch.tensor([-0.05, 1.35, 1.35, 1.35], dtype=torch.float64)
    h = rotated @ eigenvalues.diag() @ rotated.t()
    h = (h + h.t()) / 2
    assert Metric.gram(h).inverse_cholesky(0.001).damping == pytest.approx(0.1)
    with pytest.raises(NumericsError, match=r"layers.0.mlp_in.*not positive definite even with damping 0\.01\b"):
        Metric.gram(h, name="layers.0.mlp_in").inverse_cholesky(0.00001)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_statistics_are_refused_by_name(bad: float) -> None:
    h = correlated(6)
    h[1, 2] = bad
    with pytest.raises(NumericsError, match=r"Gram matrix of layers\.3\.mlp_in: 1 of 36 .* \[1, 2\]"):
        Metric.gram(h, name="layers.3.mlp_in")
    with pytest.raises(NumericsError, match="column weights of site"):
        Metric.diagonal(torch.tensor([1.0, bad]), name="site")
    with pytest.raises(NumericsError, match="row weights of site"):
        Metric.row_column(torch.tensor([bad]), torch.ones(3), name="site")


def test_impossible_metrics_are_refused() -> None:
    with pytest.raises(NumericsError, match="entry 1 is negative"):
        Metric.diagonal(torch.tensor([1.0, -2.0]))
    with pytest.raises(ConfigError, match="square"):
        Metric.gram(torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"\['any', 3\], not \[2, 4\]"):
        Metric.diagonal(torch.ones(3)).weighted_norm(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="must not be negative"):
        Metric.diagonal(torch.ones(3)).inverse_cholesky(-1.0)
    with pytest.raises(ConfigError, match="torch.eye"):
        Metric.identity().inverse_cholesky()
