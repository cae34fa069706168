"""Draft trees: their shape, the order of siblings, and the law by which they are drawn."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._proposers.gumbel import ConstantBranching, StochasticBeam, conditioned, gumbel
from trimtab.decoding._proposers.ngram import NgramLookup
from trimtab.decoding._proposers.sequences import Sequences
from trimtab.decoding._sampling import Sampling
from trimtab.decoding._tree import ROOT, DraftTree
from trimtab.evaluation.exactness import TableModel
from trimtab.evaluation.exactness.table import TableReader

MODEL = TableModel(3)
PLAIN = Distribution([Warp(Sampling(temperature=1.0))])


def reader(rows: int) -> TableReader:
    return TableReader(MODEL, rows)


def trees(proposer: Proposer, count: int, *, limit: int = 9, seed: int = 0) -> list[DraftTree]:
    generators = [torch.Generator().manual_seed(seed * count + row) for row in range(count)]
    return proposer.propose([[0]] * count, [limit] * count, generators)


def sequence(tree: DraftTree, node: int) -> tuple[int, ...]:
    return tuple(tree.tokens[n] for n in tree.path(node))


def test_sequences_are_kept_with_their_multiplicity() -> None:
    for tree in trees(Sequences(reader, PLAIN, 3, 6), 50):
        for node in (ROOT, *range(len(tree))):
            children, through = tree.children(node), 6 if node == ROOT else tree.multiplicity[node]
            if children:
                assert sum(tree.multiplicity[child] for child in children) == through
                assert len({tree.tokens[child] for child in children}) == len(children)
                assert [tree.ranks[child] for child in children] == list(range(len(children)))
        assert max(tree.depths()) == 3


def test_branching_is_constant_where_tokens_are_possible() -> None:
    for tree in trees(ConstantBranching(reader, PLAIN, (3, 2, 1)), 30):
        assert Counter(tree.depths()) == {1: 3, 2: 6, 3: 6}
    two = Distribution([Warp(Sampling(temperature=1.0, top_k=2))])
    for tree in trees(ConstantBranching(reader, two, (3, 2)), 10):
        assert Counter(tree.depths()) == {1: 2, 2: 4}


def test_beams_keep_their_width_and_their_leaves() -> None:
    ended = 0
    for tree in trees(StochasticBeam(reader, PLAIN, 3, 4), 50):
        assert set(Counter(tree.depths()).values()) == {4}
        depths = tree.depths()
        ended += sum(depths[node] < 3 and not tree.children(node) for node in range(len(tree)))
        for node in (ROOT, *range(len(tree))):
            values = [tree.values[child] for child in tree.children(node)]
            assert values == sorted(values, reverse=True)
            assert all(value <= tree.values.get(node, 0.0) + 1e-9 for value in values)
    assert ended > 50, "some branches end early and stay"


def test_no_deeper_than_the_limit() -> None:
    for proposer in (
        Chain(reader, PLAIN, 4),
        Sequences(reader, PLAIN, 4, 3),
        ConstantBranching(reader, PLAIN, (2, 2, 2)),
        StochasticBeam(reader, PLAIN, 4, 3),
    ):
        generators = [torch.Generator().manual_seed(row) for row in range(3)]
        found = proposer.propose([[0]] * 3, [0, 1, 2], generators)
        assert [max(tree.depths(), default=0) for tree in found] == [0, 1, 2]
    found = NgramLookup(4, 3).propose([[5, 6, 7, 5]] * 3, [0, 1, 2], generators)
    assert [tree.tokens for tree in found] == [[], [6], [6, 7]]


def test_conditioned_noise_has_the_wanted_maximum() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(50, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_probs[:, ::7] = -torch.inf
    perturbed = log_probs + gumbel(log_probs.shape, generator)
    wanted = torch.randn(50, generator=generator, dtype=torch.float64)
    found = conditioned(perturbed, wanted)
    assert torch.allclose(found.max(dim=-1).values, wanted, rtol=0, atol=1e-6)
    assert torch.equal(found.argsort(dim=-1, stable=True), perturbed.argsort(dim=-1, stable=True))
    largest = perturbed.max(dim=-1, keepdim=True).values
    plain = -torch.log(torch.exp(-wanted[:, None]) - torch.exp(-largest) + torch.exp(-perturbed))
    assert torch.allclose(found, plain, atol=1e-6), "the formula that may overflow, where it does not"


def test_conditioned_noise_does_not_overflow() -> None:
    perturbed = torch.tensor([[-800.0, -5.0, -900.0], [700.0, 3.0, -700.0]], dtype=torch.float64)
    found = conditioned(perturbed, torch.tensor([-400.0, 600.0], dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert found.max(dim=-1).values.tolist() == [-400.0, 600.0]


def _all_sequences(depth: int) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        found = {
            (*own, token): probability * float(p)
            for own, probability in found.items()
            for token, p in enumerate(torch.softmax(MODEL.rows([own]).logits[0].double(), -1))
        }
    return found


def _sets_by_enumeration(width: int) -> dict[frozenset[tuple[int, ...]], float]:
    """Probabilities of sets of pairs drawn without replacement."""
    exact = _all_sequences(2)
    found: dict[frozenset[tuple[int, ...]], float] = {}
    for first, second in itertools.permutations(exact, width):
        probability = exact[first] * exact[second] / (1 - exact[first])
        found[frozenset((first, second))] = found.get(frozenset((first, second)), 0.0) + probability
    return found


def _beam_test(proposer: Proposer, count: int) -> float:
    """p-value of the sets of leaves at depth 2 against draws without replacement of whole sequences."""
    exact = _sets_by_enumeration(2)
    seen = Counter(
        frozenset(sequence(tree, node) for node, depth in enumerate(tree.depths()) if depth == 2)
        for batch in range(count // 1000)
        for tree in trees(proposer, 1000, seed=batch)
    )
    common = [own for own, probability in exact.items() if probability * count >= 5]
    observed = np.array([*(seen[own] for own in common), count - sum(seen[own] for own in common)], dtype=float)
    expected = np.array([exact[own] * count for own in common])
    expected = np.append(expected, count - expected.sum())
    return float(stats.chisquare(observed, expected).pvalue)


def test_beams_are_draws_without_replacement_of_whole_sequences() -> None:
    assert _beam_test(StochasticBeam(reader, PLAIN, 2, 2), 4_000) > 1e-4


def test_beams_without_conditioned_noise_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node's rejection chain stays exact, so this test alone sees it."""
    from trimtab.decoding._proposers import gumbel as module

    monkeypatch.setattr(module, "conditioned", lambda perturbed, wanted: perturbed)
    assert _beam_test(StochasticBeam(reader, PLAIN, 2, 2), 4_000) < 1e-4


@pytest.mark.parametrize(
    ("text", "longest", "drafted"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 9, 2, 4, 1, 2], 3, [3, 9, 2]),  # the longer match wins over the later one
        ([1, 2, 3, 9, 2, 4, 1, 2], 1, [4, 1, 2]),
        ([7, 1, 7, 2, 7], 2, [2, 7]),  # of equal matches the later one
        ([5, 5, 5], 3, [5]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_n_grams_continue_the_longest_match(text: list[int], longest: int, drafted: list[int]) -> None:
    (tree,) = NgramLookup(3, longest).propose([text], [9], [torch.Generator()])
    assert tree.tokens == drafted
    assert tree.parents == list(range(-1, len(drafted) - 1))
