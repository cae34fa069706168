"""Acceptance rules on single nodes: published numbers, optima by brute force, what is left to draw from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.decoding._rules.block import BlockRule
from trimtab.decoding._rules.k_seq import KSeqRule, division
from trimtab.decoding._rules.recursive import RecursiveRule, left_over
from trimtab.decoding._rules.token import TokenRule
from trimtab.decoding._rules.typical import TypicalRule
from trimtab.decoding._sampling import normalised
from trimtab.decoding._tree import ROOT, DraftTree

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.2, 0.35, 0.15, 0.30], dtype=torch.float64)


def pair(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    drawn = np.random.default_rng(seed).dirichlet([0.7] * size, size=2)
    return torch.tensor(drawn[0]), torch.tensor(drawn[1])


def best_of_independent(p: Tensor, q: Tensor, drafts: int) -> float:
    """What the best coupling of so many independent drafts accepts: 1 + min over sets S of q(S) - p(S)^K."""
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(p))), dtype=torch.float64)
    return float(1 + (sets @ q - (sets @ p) ** drafts).min())


def recursive_acceptance(p: Tensor, q: Tensor, tokens: Sequence[int]) -> float:
    """Probability that one of these siblings passes, one after the other."""
    refused = 1.0
    for token in tokens:
        refused *= 1 - min(1.0, float(q[token] / p[token]))
        q, p = left_over(q, p, token)
    return 1 - refused


def without_replacement(p: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Ordered draws and their probabilities."""
    found = {}
    for tokens in itertools.permutations(range(len(p)), count):
        probability, rest = 1.0, 1.0
        for token in tokens:
            probability *= float(p[token]) / rest
            rest -= float(p[token])
        found[tokens] = probability
    return found


@pytest.mark.parametrize(
    ("drafts", "rho", "beta", "accepted", "optimum"),
    [
        (1, 1.0, 0.7, 0.7, 0.7),
        (2, 1.475625, 0.524375, 0.773781, 0.7975),
        (3, 1.933773, 0.411987, 0.796689, 0.842625),
    ],
)
def test_k_seq_reproduces_known_values(drafts: int, rho: float, beta: float, accepted: float, optimum: float) -> None:
    found = division(P, Q, drafts)
    assert found.factor == pytest.approx(rho, abs=1e-5)
    assert float(torch.minimum(P, Q / found.factor).sum()) == pytest.approx(beta, abs=1e-5)
    assert found.accepted == pytest.approx(accepted, abs=1e-5)
    assert best_of_independent(P, Q, drafts) == pytest.approx(optimum, abs=1e-5)


@pytest.mark.parametrize(("siblings", "accepted"), [(1, 0.7), (2, 0.78), (3, 0.825357)])
def test_recursive_rejection_reproduces_known_values(siblings: int, accepted: float) -> None:
    draws = without_replacement(P, siblings)
    found = sum(probability * recursive_acceptance(P, Q, tokens) for tokens, probability in draws.items())
    assert found == pytest.approx(accepted, abs=1e-5)


def test_recursive_rejection_with_all_tokens_never_falls_through() -> None:
    for seed in range(20):
        p, q = pair(seed, 4)
        assert all(recursive_acceptance(p, q, tokens) > 1 - 1e-6 for tokens in itertools.permutations(range(4)))


@pytest.mark.parametrize("drafts", [2, 3, 8])
def test_k_seq_is_valid_at_its_factor_and_not_below(drafts: int) -> None:
    """With smaller factors what is left of the target is no distribution; the share that is accepted is guaranteed."""
    for seed in range(100):
        p, q = pair(seed)
        found = division(p, q, drafts)

        def rest(rho: float, p: Tensor = p, q: Tensor = q) -> Tensor:
            least = torch.minimum(p, q / rho)
            beta = float(least.sum())
            return q - least * ((1 - (1 - beta) ** drafts) / beta)

        assert 1 <= found.factor <= drafts
        assert float(rest(found.factor).min()) >= -1e-9
        assert torch.allclose(rest(found.factor), (q - found.factor * p).clamp_min(0), atol=1e-9)
        if found.factor > 1.05:
            assert float(rest(found.factor - 0.05).min()) < 0
        optimum = best_of_independent(p, q, drafts)
        assert (1 - (1 - 1 / drafts) ** drafts) * optimum - 1e-9 <= found.accepted <= optimum + 1e-9


def test_k_seq_beats_recursive_rejection_of_independent_drafts() -> None:
    for seed in range(300):
        p, q = pair(seed)
        refused, rest = 1.0, q
        for _ in range(3):
            refused *= 1 - float(torch.minimum(p, rest).sum())
            rest = normalised(rest - p, rest)
        assert division(p, q, 3).accepted >= 1 - refused - 1e-9


def test_k_seq_at_the_edges() -> None:
    same = division(P, P, 4)
    assert same.factor == 1.0
    assert same.accepted == pytest.approx(1.0)
    assert division(P, P + torch.tensor([1e-9, -1e-9, 0, 0]), 4).accepted == pytest.approx(1.0, abs=1e-7)
    apart = division(torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5]), 4)
    assert apart.accepted == 0
    point = division(torch.tensor([1.0, 0]), torch.tensor([0.5, 0.5]), 4)
    assert point.accepted == pytest.approx(0.5)


def chain(tokens: Sequence[int], probs: Tensor) -> DraftTree:
    """A chain whose tokens were drawn from these rows of [N, V]."""
    tree = DraftTree("iid")
    node = ROOT
    for token, own in zip(tokens, probs, strict=True):
        tree.draft_probs[node] = own
        node = tree.add(token, node)
    return tree


def drawn_chains(count: int, depth: int, *, same: bool = False, size: int = 6) -> list[tuple[DraftTree, Tensor]]:
    """Chains with the target's distributions along them, [depth + 1, V]; `same`: those of the draft."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(count):
        drafts = torch.tensor(random.dirichlet([0.7] * size, size=depth), dtype=torch.float32)
        targets = torch.tensor(random.dirichlet([0.7] * size, size=depth + 1), dtype=torch.float32)
        if same:
            targets[:depth] = drafts
        tokens = [int(random.choice(size, p=own.double().numpy() / float(own.double().sum()))) for own in drafts]
        found.append((chain(tokens, drafts), targets))
    return found


def test_one_sequence_is_speculative_sampling() -> None:
    for seed, (tree, targets) in enumerate(drawn_chains(200, 3)):
        one, other = (
            rule.walk(tree, targets, torch.Generator().manual_seed(seed)) for rule in (KSeqRule(), TokenRule())
        )
        assert one == other


@pytest.mark.parametrize("rule", [TokenRule(), BlockRule(), KSeqRule()], ids=lambda rule: type(rule).__name__)
def test_a_perfect_draft_is_accepted_whole(rule: TokenRule | BlockRule | KSeqRule) -> None:
    for seed, (tree, targets) in enumerate(drawn_chains(100, 4, same=True)):
        assert len(rule.walk(tree, targets, torch.Generator().manual_seed(seed)).path) == 4


def test_nothing_impossible_is_accepted() -> None:
    """Draft and target without a common token: every draft is refused, and what follows is the target's."""
    draft, target = torch.tensor([[0.5, 0.5, 0, 0]] * 2), torch.tensor([[0, 0, 0.5, 0.5]] * 3)
    for rule in (TokenRule(), BlockRule(), KSeqRule()):
        for seed in range(50):
            walk = rule.walk(chain([0, 1], draft), target, torch.Generator().manual_seed(seed))
            assert (walk.path, walk.next_token) in (((), 2), ((), 3))
    tree = DraftTree("gumbel_swor", draft_probs={ROOT: draft[0]})
    tree.add(1, ROOT)
    tree.add(0, ROOT, rank=1)
    for seed in range(50):
        walk = RecursiveRule().walk(tree, target, torch.Generator().manual_seed(seed))
        assert (walk.path, walk.next_token) in (((), 2), ((), 3))


def test_blocks_are_accepted_for_longer_than_tokens() -> None:
    """Sun et al., theorem 2, with a margin of four standard errors."""
    lengths = {}
    for rule in (TokenRule(), BlockRule()):
        chains = drawn_chains(6_000, 4, size=4)
        walks = [rule.walk(tree, q, torch.Generator().manual_seed(seed)) for seed, (tree, q) in enumerate(chains)]
        lengths[type(rule)] = np.array([len(walk.path) for walk in walks], dtype=float)
    gain = lengths[BlockRule] - lengths[TokenRule]
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_typical_acceptance_takes_what_is_plausible() -> None:
    """exp(-H) of four equal tokens is 1/4: the limit is min(0.09, 0.3 / 4)."""
    flat, peaked = torch.full((4,), 0.25), torch.tensor([0.97, 0.01, 0.01, 0.01])
    rule = TypicalRule(0.09, 0.3)
    generator = torch.Generator().manual_seed(0)
    drafts = torch.full((2, 4), 0.25)
    assert rule.walk(chain([1, 2], drafts), torch.stack([flat] * 3), generator).path == (0, 1)
    assert rule.walk(chain([1, 2], drafts), torch.stack([flat, peaked, flat]), generator).path == (0,)
    assert rule.walk(chain([0, 1], drafts), torch.stack([peaked] * 3), generator).path == (0,)
    assert TypicalRule.lossy
