"""Selection: exact counts, a tie rule that does not depend on scores, and the global threshold as one selection."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.weights._pruning.selection import (
    Sparsity,
    counts_of_all,
    smallest,
    smallest_of_groups,
    smallest_of_matrix,
    smallest_of_rows,
)

scores_of = st.builds(
    lambda rows, columns, seed, levels: torch.randint(
        levels, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).float(),
    st.integers(1, 7),
    st.sampled_from([4, 8, 24]),
    st.integers(0, 999),
    st.sampled_from([2, 5, 1000]),  # few levels: many ties
)


@settings(max_examples=60, deadline=None)
@given(scores=scores_of, data=st.data())
def test_counts_are_exact_and_nothing_smaller_is_kept(scores: Tensor, data: st.DataObject) -> None:
    rows, columns = scores.shape
    count = data.draw(st.integers(0, columns))
    removed = smallest_of_rows(scores, count)
    assert removed.sum(dim=1).tolist() == [count] * rows
    for own, gone in zip(scores, removed, strict=True):
        if 0 < count < columns:
            threshold = own[gone].max()
            assert threshold <= own[~gone].min()
            tied = (own == threshold).nonzero()[:, 0]
            assert gone[tied].int().diff().max().item() <= 0 if len(tied) > 1 else True  # the first of them go
    whole = smallest_of_matrix(scores, count)
    assert int(whole.sum()) == count
    assert torch.equal(whole.view(1, -1), smallest(scores.view(1, -1), count))


@settings(max_examples=40, deadline=None)
@given(scores=scores_of, n=st.integers(1, 3))
def test_every_group_loses_n(scores: Tensor, n: int) -> None:
    removed = smallest_of_groups(scores, n, 4)
    assert bool((removed.view(-1, 4).sum(dim=1) == n).all())
    first = smallest(scores[:1, :4], n)
    assert torch.equal(removed[:1, :4], first)


@settings(max_examples=60, deadline=None)
@given(
    matrices=st.lists(scores_of, min_size=1, max_size=4),
    share=st.floats(0.01, 0.99),
    scale=st.sampled_from([1.0, 1e-30, 3e7]),
)
def test_the_threshold_over_all_is_the_selection_over_their_concatenation(
    matrices: list[Tensor], share: float, scale: float
) -> None:
    matrices = [own * scale for own in matrices]
    together = torch.cat([own.reshape(-1) for own in matrices])
    count = max(1, int(share * together.numel()))

    def scores() -> Iterator[tuple[str, Tensor]]:
        return ((str(index), own) for index, own in enumerate(matrices))

    counts = counts_of_all(scores, count)
    expected = smallest(together[None], count)[0].split([own.numel() for own in matrices])
    assert [counts[str(index)] for index in range(len(matrices))] == [int(own.sum()) for own in expected]
    for index, own in enumerate(matrices):
        assert torch.equal(smallest_of_matrix(own, counts[str(index)]).reshape(-1), expected[index])


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(NumericsError, match="2 of 4 scores are NaN"):
        smallest(torch.tensor([[1.0, torch.nan, torch.nan, 2.0]]), 1)
    for bad in (-1.0, torch.inf):
        with pytest.raises(NumericsError, match="scores of w are not all finite and non-negative"):
            counts_of_all(lambda bad=bad: iter([("w", torch.tensor([bad, 1.0]))]), 1)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="3 of 2 scores"):
        counts_of_all(lambda: iter([("w", torch.ones(2))]), 3)
    with pytest.raises(ConfigError, match="do not divide 6"):
        smallest_of_groups(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize(
    ("text", "share", "group"),
    [
        (0.5, Fraction(1, 2), None),
        ("0.29", Fraction(29, 100), None),
        ("60%", Fraction(3, 5), None),
        ("2:4", Fraction(1, 2), (2, 4)),
        (" 1 : 4 ", Fraction(1, 4), (1, 4)),
        ("4:8", Fraction(1, 2), (4, 8)),
    ],
)
def test_sparsity_is_read(text: float | str, share: Fraction, group: tuple[int, int] | None) -> None:
    assert Sparsity.of(text, "Wanda") == Sparsity(share, group)


@pytest.mark.parametrize("text", [0, 1, 1.0, -0.5, 1.5, "0", "100%", "half", "nan", "inf", "", "1/0"])
def test_shares_outside_the_range_are_refused(text: float | str) -> None:
    with pytest.raises(ConfigError, match=r"Wanda: option sparsity=.* above 0 and below 1"):
        Sparsity.of(text, "Wanda")


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_patterns_that_remove_nothing_or_everything_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0 < n < m"):
        Sparsity.of(text, "Wanda")


def test_count_rules_are_those_of_the_papers_code() -> None:
    """Computed from the share as written: 0.29 * 100 is 28.999999999999996 as floats."""
    assert Sparsity.of(0.5, "x").row_count(7) == 3
    assert Sparsity.of(0.29, "x").row_count(100) == 29
    assert Sparsity.of(0.5, "x").matrix_count(100) == 51
    assert Sparsity.of(0.3, "x").matrix_count(7) == 3
