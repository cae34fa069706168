"""Values and outputs of few directions: the error is the discarded tail, and no other choice of the rank is better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.weights._pruning.value_factors import value_factors

HEAD, WIDTH, QUERIES = 8, 20, 3


def example(seed: int = 0, queries: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    """Values [head_dim, in], stacked outputs [queries * out, head_dim], Gram matrix [in, in] of unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, WIDTH, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, WIDTH).double()
    values = torch.randn(HEAD, WIDTH, generator=generator, dtype=torch.float64)
    return values, torch.randn(queries * WIDTH, HEAD, generator=generator, dtype=torch.float64), x.T @ x / 400


def error(product: Tensor, exact: Tensor, gram: Tensor) -> float:
    difference = product - exact
    return float(((difference @ gram) * difference).sum())


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_reported_error_is_that_of_the_product(rank: int, by_output: bool) -> None:
    values, outputs, gram = example()
    made = value_factors(values, outputs, gram, rank, by_output=by_output)
    assert made.values.shape == (rank, WIDTH)
    assert made.outputs.shape == (QUERIES * WIDTH, rank)
    found = error(made.outputs @ made.values, outputs @ values, gram)
    assert made.error == pytest.approx(found, rel=1e-8)
    assert made.scale == pytest.approx(error(outputs @ values, 0 * outputs @ values, gram), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_the_discarded_tail_of_the_whitened_product(rank: int) -> None:
    """By the definition: singular values of O V C^1/2, the least any matrix of this rank can leave."""
    values, outputs, gram = example()
    eigenvalues, vectors = torch.linalg.eigh(gram)
    tail = torch.linalg.svdvals(outputs @ values @ (vectors * eigenvalues.sqrt()))[rank:].square().sum()
    assert value_factors(values, outputs, gram, rank).error == pytest.approx(float(tail), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_never_above_the_product_without_statistics_nor_above_values_alone(seed: int) -> None:
    values, outputs, gram = example(seed)
    exact = outputs @ values
    for rank in (2, 5):
        best = value_factors(values, outputs, gram, rank).error
        left, singular, right = torch.linalg.svd(exact, full_matrices=False)
        plain = (left[:, :rank] * singular[:rank]) @ right[:rank]
        assert best < error(plain, exact, gram)
        assert best < value_factors(values, outputs, gram, rank, by_output=False).error


def test_values_alone_are_chosen_by_their_own_energy() -> None:
    """What the paper does for grouped queries: the k leading directions of C^1/2 V, whatever reads them."""
    values, outputs, gram = example()
    made = value_factors(values, outputs, gram, 3, by_output=False)
    again = value_factors(values, outputs.flip(0) * 5, gram, 3, by_output=False)
    torch.testing.assert_close(made.values, again.values)
    alone = value_factors(values, torch.eye(HEAD, dtype=torch.float64), gram, 3, by_output=False)
    energies = torch.linalg.eigvalsh(values @ gram @ values.T)
    assert alone.error == pytest.approx(float(energies[:-3].sum()), rel=1e-8)


def test_all_directions_reproduce_the_product() -> None:
    values, outputs, gram = example()
    made = value_factors(values, outputs, gram, HEAD)
    torch.testing.assert_close(made.outputs @ made.values, outputs @ values, rtol=1e-8, atol=1e-8)


def test_directions_that_no_token_reaches_are_dropped() -> None:
    values, outputs, _ = example()
    values[2] = 0
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gram = x.T @ x / 4  # rank 4, eight directions
    made = value_factors(values, outputs, gram, 6)
    assert bool(torch.isfinite(made.values).all())
    assert error(made.outputs @ made.values, outputs @ values, gram) < 1e-8 * made.scale
    nothing = value_factors(values, outputs, torch.zeros_like(gram), 2)
    assert not bool(nothing.values.any())
