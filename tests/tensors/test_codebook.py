"""Additive codebooks: the search is exact where it can be and never worse than where it began."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors import codebook_search
from trimtab.tensors.base import part_from_state
from trimtab.tensors.codebook import Codebook
from trimtab.tensors.codebook_search import best_codes, best_codes_of_rows, sum_of_codes
from trimtab.tensors.metric import Metric


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, size: int, seed: int = 1) -> Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))


def part(out: int = 12, vectors: int = 6, count: int = 2, size: int = 8, width: int = 4) -> Codebook:
    codes = random_codes(out, vectors, count, size=size).to(torch.uint8)
    return Codebook(codes, drawn(count, size, width, seed=2).half(), torch.linspace(0.3, 3, out).half())


def gram(width: int, seed: int = 3) -> Tensor:
    x = drawn(200, width, seed=seed) @ drawn(width, width, seed=seed + 1)
    return x.T @ x / 200


def objective(target: Tensor, found: Tensor, matrix: Tensor) -> float:
    error = target - found
    return float((error @ matrix * error).sum())


def test_the_weight_is_the_scaled_sum_of_the_named_vectors() -> None:
    p = part()
    dense = p.dequantize()
    for row, vector in ((0, 0), (5, 3), (11, 5)):
        total = sum(p.codebooks[m, int(p.codes[row, vector, m])].float() for m in range(2))
        torch.testing.assert_close(dense[row, 4 * vector : 4 * vector + 4], p.scales[row].float() * total)


def test_codebook_gradients_are_scatter_sums() -> None:
    """Invariant of PV-Tuning: dL/dC_m[c] = sum of s G over its vectors; dL/ds = sum over the row of G times the sum."""
    p = part()
    numbers = {name: value.float().requires_grad_() for name, value in p.continuous().items()}
    g = drawn(*p.shape, seed=5)
    p.dense(numbers).backward(g)  # type: ignore[no-untyped-call]
    scaled = (g * p.scales.float()[:, None]).view(12, 6, 4)
    for m in range(2):
        expected = torch.zeros(8, 4).index_add_(0, p.codes[..., m].long().flatten(), scaled.flatten(0, 1))
        torch.testing.assert_close(numbers["codebooks"].grad[m], expected)  # type: ignore[index]
    unscaled = p.dequantize() / p.scales.float()[:, None]
    torch.testing.assert_close(numbers["scales"].grad, (g * unscaled).sum(1))


def test_one_codebook_finds_the_nearest_vector() -> None:
    points, table = drawn(50, 4), drawn(1, 16, 4, seed=1)
    found = best_codes(points, torch.zeros(50, 1), table)
    assert torch.equal(found[:, 0], torch.cdist(points, table[0]).argmin(1))
    other = best_codes(points, found, table, differ=True)
    assert torch.equal(other[:, 0], torch.cdist(points, table[0]).argsort(1)[:, 1])


@pytest.mark.parametrize("h", [None, gram(4)])
def test_a_beam_as_wide_as_the_codebooks_finds_the_best_of_all_sums(h: Tensor | None) -> None:
    """Two codebooks: with every first code kept, the second is searched for each of them."""
    points, tables = drawn(20, 4), drawn(2, 8, 4, seed=1)
    matrix = torch.eye(4) if h is None else h
    found = best_codes(points @ matrix, random_codes(20, 2, size=8), tables, gram=h, beam=8)
    errors = {
        pair: torch.einsum("ng,gh,nh->n", d, matrix, d)
        for pair in itertools.product(range(8), repeat=2)
        if (d := points - tables[0, pair[0]] - tables[1, pair[1]]) is not None
    }
    best = torch.stack(list(errors.values())).min(0).values
    d = points - sum_of_codes(found, tables)
    torch.testing.assert_close(torch.einsum("ng,gh,nh->n", d, matrix, d), best)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("beam", [1, 3])
def test_a_search_is_never_worse_than_where_it_began(count: int, beam: int) -> None:
    points, tables, old = drawn(200, 4), drawn(count, 16, 4, seed=1), random_codes(200, count, size=16)
    found = best_codes(points, old, tables, beam=beam)
    before, after = ((points - sum_of_codes(codes, tables)).square().sum(1) for codes in (old, found))
    assert bool((after <= before + 1e-5).all())
    again = best_codes(points, found, tables, beam=beam)
    assert float((points - sum_of_codes(again, tables)).square().sum()) <= float(after.sum()) + 1e-4
    other = best_codes(points, found, tables, beam=beam, differ=True)
    assert bool((other != found).any(1).all())


def test_slices_of_a_long_search_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    points, tables, old = drawn(100, 4), drawn(2, 16, 4, seed=1), random_codes(100, 2, size=16)
    whole = best_codes(points, old, tables, beam=3)
    monkeypatch.setattr(codebook_search, "_CHUNK_BYTES", 4 * 3 * 16 * 7)
    assert torch.equal(best_codes(points, old, tables, beam=3), whole)


@pytest.mark.parametrize("count", [1, 2])
def test_searching_in_a_metric_lowers_its_norm_below_that_of_the_nearest_vectors(count: int) -> None:
    p, target = part(count=count), drawn(12, 24, seed=7)
    metric = Metric.gram(gram(24))
    start = p.project(target)
    found = start.project(target, metric)
    before, after = (metric.squared_norm(target - q.dequantize()) for q in (start, found))
    assert after < 0.9 * before
    again = found.project(target, metric)
    assert metric.squared_norm(target - again.dequantize()) <= after * (1 + 1e-5)


def test_the_search_in_a_metric_notices_a_slope_that_is_not_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant: vectors of a row do not see what earlier ones left, as with a block-diagonal H."""
    p, target, matrix = part(count=1), drawn(12, 24, seed=7), gram(24)
    start = p.project(target)
    points = target / p.scales.float()[:, None]
    right = best_codes_of_rows(points, start.codes, p.codebooks.float(), matrix)
    blocks = torch.block_diag(*(matrix[i : i + 4, i : i + 4] for i in range(0, 24, 4)))
    wrong = best_codes_of_rows(points, start.codes, p.codebooks.float(), blocks)
    errors = [objective(points, sum_of_codes(c, p.codebooks.float()).flatten(1), matrix) for c in (right, wrong)]
    assert errors[0] < 0.9 * errors[1]


def test_a_diagonal_metric_weighs_the_entries_of_a_vector() -> None:
    p, target = part(count=1), drawn(12, 24, seed=7)
    column = torch.rand(24, generator=torch.Generator().manual_seed(4)) + 0.01
    found = p.project(target, Metric.diagonal(column))
    points = (target / p.scales.float()[:, None]).view(12, 6, 1, 4)
    distance = ((points - p.codebooks[0].float()).square() * column.view(6, 1, 4)).sum(-1)
    assert torch.equal(found.codes[..., 0].long(), distance.argmin(-1))


def test_a_subset_limits_the_change_also_in_a_metric() -> None:
    p, target = part(), drawn(12, 24, seed=7)
    subset = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    for metric in (None, Metric.gram(gram(24))):
        found = p.project(target, metric, subset)
        assert torch.equal(found.codes[~subset], p.codes[~subset])
        assert not torch.equal(found.codes[subset], p.codes[subset])
    with pytest.raises(ConfigError, match="leave out the metric"):
        p.project(target, Metric.gram(gram(24)), differ=True)


def test_scales_are_divided_out_before_vectors_are_compared() -> None:
    """Rows that differ by a factor only, and so do their scales, have the same codes."""
    table = drawn(1, 8, 4).half()
    row = drawn(1, 16, seed=3)
    factors = torch.tensor([0.125, 1.0, 8.0])
    p = Codebook(torch.zeros(3, 4, 1, dtype=torch.uint8), table, factors.half()).project(row * factors[:, None])
    assert torch.equal(p.codes[0], p.codes[1])
    assert torch.equal(p.codes[0], p.codes[2])


def test_a_target_that_lies_transposed_in_memory_is_the_same_target() -> None:
    p, target = part(), drawn(12, 24, seed=7)
    assert torch.equal(p.project(target.T.contiguous().T).codes, p.project(target).codes)


def test_rows_of_scale_zero_are_zero() -> None:
    p = part()
    p = Codebook(p.codes, p.codebooks, p.scales.masked_fill(torch.arange(12) == 3, 0))
    assert bool((p.project(drawn(12, 24)).dequantize()[3] == 0).all())


@pytest.mark.parametrize(("count", "size"), [(1, 256), (2, 4), (1, 512)])
def test_storage_round_trip_product_and_bytes(count: int, size: int) -> None:
    codes = random_codes(8, 6, count, size=size).to(torch.uint8 if size <= 256 else torch.int16)
    p = Codebook(codes, drawn(count, size, 4).half(), drawn(8).half())
    spec, state = json.loads(json.dumps(p.spec())), p.state()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == Codebook.buffers(spec)
    back = part_from_state(spec, state)
    back.check()
    assert torch.equal(back.dequantize(), p.dequantize())
    assert p.nbytes == 48 * count * (1 if size <= 256 else 2) + count * size * 4 * 2 + 8 * 2
    for x in (drawn(24), drawn(2, 3, 24)):
        torch.testing.assert_close(back.matmul(x), x @ p.dequantize().T, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    p = part()
    with pytest.raises(ConfigError, match="power of two"):
        Codebook(p.codes, p.codebooks[:, :7], p.scales)
    with pytest.raises(ConfigError, match=r"want torch\.uint8, float16 and float16"):
        Codebook(p.codes, p.codebooks.float(), p.scales)
    with pytest.raises(ConfigError, match=r"must be \[out, in / g, M\]"):
        Codebook(p.codes, p.codebooks, p.scales[:5])
    with pytest.raises(ConfigError, match="target of shape"):
        p.project(torch.zeros(3, 3))
    with pytest.raises(NumericsError, match="NaN or infinite"):
        p.project(torch.full(p.shape, float("nan")))
    for name, wrong in (("group_size", 5), ("codebooks", 0), ("code_bits", 16), ("code_bits", "8")):
        with pytest.raises(CheckpointError, match="'group_size' must divide"):
            Codebook.buffers({**p.spec(), name: wrong})


def test_a_checkpoint_with_a_code_beyond_its_codebooks_is_refused() -> None:
    p = part()
    codes = p.codes.clone()
    codes[2, 1, 0] = 8
    with pytest.raises(CheckpointError, match="to 8 for codebooks of 8 vectors"):
        Codebook(codes, p.codebooks, p.scales).check()
    with pytest.raises(CheckpointError, match="'scales' has NaN"):
        Codebook(p.codes, p.codebooks, p.scales * float("inf")).check()
