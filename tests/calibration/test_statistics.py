"""Accumulators: what they compute, that chunks and workers do not matter, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from trimtab.core.errors import CheckpointError, NumericsError
from trimtab.models.statistics import ACCUMULATORS, SiteAccumulator, Stats
from trimtab.models.statistics_file import load_statistics, save_statistics

NEEDS = tuple(ACCUMULATORS)


def rows(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def gathered(chunks: list[Tensor], seed: int = 0) -> Stats:
    accumulator = SiteAccumulator("layers.0.mlp_in", chunks[0].shape[-1], NEEDS, seed=seed)
    for chunk in chunks:
        accumulator.update(chunk)
    return accumulator.stats()


def assert_moments(stats: Stats, x: Tensor) -> None:
    exact = x.double()
    assert stats.count == len(x)
    torch.testing.assert_close(stats.abs_max, x.abs().amax(0))
    torch.testing.assert_close(stats.mean, exact.mean(0).float())
    torch.testing.assert_close(stats.mean_abs, exact.abs().mean(0).float())
    torch.testing.assert_close(stats.second_moment, exact.square().mean(0).float())
    torch.testing.assert_close(stats.gram, (exact.T @ exact / len(x)).float(), rtol=1e-5, atol=1e-5)


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_chunks_do_not_matter(cuts: list[int]) -> None:
    x = rows(sum(cuts))
    stats = gathered(list(x.split(cuts)))
    assert_moments(stats, x)
    assert torch.equal(stats.reservoir, gathered([x]).reservoir)


@given(first=st.integers(1, 60), second=st.integers(1, 60))
def test_workers_merge_by_weight(first: int, second: int) -> None:
    x = rows(first + second)
    a, b = (SiteAccumulator("s", 6, NEEDS, seed=seed) for seed in (1, 2))
    a.update(x[:first])
    b.update(x[first:])
    a.merge(b)
    assert_moments(a.stats(), x)
    sample = a.stats().reservoir
    assert sorted(map(tuple, sample.tolist())) == sorted(map(tuple, x.tolist()))  # fewer rows than it holds


def test_merging_with_a_worker_that_saw_nothing() -> None:
    x = rows(9)
    seen, idle = (SiteAccumulator("s", 6, NEEDS) for _ in range(2))
    seen.update(x)
    seen.merge(idle)
    assert_moments(seen.stats(), x)
    idle.merge(seen)
    assert_moments(idle.stats(), x)


def test_merging_does_not_change_the_other() -> None:
    a, b = (SiteAccumulator("s", 6, NEEDS) for _ in range(2))
    b.update(rows(5))
    before = b.stats().gram.clone()
    a.merge(b)
    a.update(rows(7, seed=3))
    assert torch.equal(b.stats().gram, before)


def test_other_sites_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        SiteAccumulator("a", 6, NEEDS).merge(SiteAccumulator("b", 6, NEEDS))


def test_padding_enters_no_statistic() -> None:
    x = rows(12).view(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    x[~mask] = torch.nan  # whatever stands at padding
    accumulator = SiteAccumulator("s", 6, NEEDS)
    accumulator.update(x, mask)
    assert_moments(accumulator.stats(), x[mask])


def test_only_padding_leaves_no_statistic() -> None:
    accumulator = SiteAccumulator("s", 6, NEEDS)
    accumulator.update(rows(4), torch.zeros(4, dtype=torch.bool))
    assert accumulator.stats() == Stats("s", 0)


def test_reservoir_is_uniform() -> None:
    """Each of 2000 rows is kept with probability 512/2000; over 40 seeds the mean kept index is the middle."""
    x = torch.arange(2000.0).view(-1, 1)
    kept = []
    for seed in range(40):
        accumulator = SiteAccumulator("s", 1, ["reservoir"], seed=seed)
        for chunk in x.split(300):
            accumulator.update(chunk)
        sample = accumulator.stats().reservoir
        assert sample.shape == (512, 1)
        assert len(sample.unique()) == 512
        kept.append(sample)
    means = torch.stack(kept).mean(dim=(1, 2))
    # a mean of 512 of 2000 without replacement has a standard deviation of 22; of 40 such, 3.5
    assert abs(float(means.mean()) - 999.5) < 4 * 3.5
    assert len(means.unique()) == 40


def test_float32_means_stay_exact_over_many_chunks() -> None:
    """A float32 sum of 400 chunks of large values would drift; a running mean does not."""
    x = rows(4000) * 100
    stats = gathered(list(x.split(10)))
    torch.testing.assert_close(stats.gram, (x.double().T @ x.double() / len(x)).float(), rtol=3e-6, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_are_refused_by_name(bad: float) -> None:
    x = rows(5).view(1, 5, 6)
    x[0, 3, 2] = bad
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.q.*layers\.0\.attention_in.*token 3, channel 2"):
        SiteAccumulator("layers.0.attention_in", 6, ["gram"]).update(x, module="model.layers.0.q")


def test_overflowing_squares_are_refused() -> None:
    accumulator = SiteAccumulator("s", 2, ["gram"])
    accumulator.update(torch.full((3, 2), 1e30))
    with pytest.raises(NumericsError, match="'gram' of site s is not finite"):
        accumulator.stats()


def test_statistics_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    kept = {"layers.0.mlp_in": gathered([rows(20)]), "layers.1.mlp_in": Stats("layers.1.mlp_in", 7, abs_max=rows(1)[0])}
    save_statistics(path, kept, data_sha256="ab12", dtype="bfloat16")
    found, header = load_statistics(path)
    assert header == {"data_sha256": "ab12", "dtype": "bfloat16"}
    assert found.keys() == kept.keys()
    for site, stats in kept.items():
        assert found[site].count == stats.count
        for need in NEEDS:
            expected, value = getattr(stats, need), getattr(found[site], need)
            assert (value is None) == (expected is None)
            assert expected is None or torch.equal(value, expected)
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_statistics_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_statistics(path, {"s": gathered([rows(20)])}, data_sha256="ab", dtype="float32")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(tmp_path / "missing.safetensors")
