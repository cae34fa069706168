"""What is decoded follows the distribution that it should, for all drafts, rules and transforms; broken ones do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import CompositionError
from trimtab.decoding._distribution import Distribution, LogitsTransform
from trimtab.decoding._loop import Loop
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._proposers.gumbel import ConstantBranching
from trimtab.decoding._proposers.ngram import NgramLookup
from trimtab.decoding._proposers.sequences import Sequences
from trimtab.decoding._reader import Reader
from trimtab.decoding._rules import block, k_seq, recursive, token
from trimtab.decoding._rules.base import AcceptanceRule, Walk
from trimtab.decoding._rules.block import BlockRule
from trimtab.decoding._rules.k_seq import Division, KSeqRule
from trimtab.decoding._rules.recursive import RecursiveRule
from trimtab.decoding._rules.token import SampleRule, TokenRule
from trimtab.decoding._rules.typical import TypicalRule
from trimtab.decoding._sampling import draw, normalised, uniform
from trimtab.decoding._tree import DraftTree, Law
from trimtab.evaluation.exactness import check_pairs
from trimtab.evaluation.exactness.gate import ROUNDS
from trimtab.evaluation.exactness.table import TableReader

from .loops import CASES, DRAFT, SEQUENCES, TRANSFORMS, Case, Likeliest, NewReader, case

FEW_ROUNDS = 12_000
IN_EACH_RUN = [each for each in CASES if "plain" in each.name or each.name.startswith(("chain", "stochastic"))]


@pytest.mark.parametrize("each", IN_EACH_RUN, ids=str)
def test_follows_the_exact_distribution(each: Case) -> None:
    assert check_pairs(each.new_loop, each.expected, rounds=FEW_ROUNDS, new_tokens=each.new_tokens).exact


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("each", CASES, ids=str)
def test_follows_the_exact_distribution_in_many_rounds(each: Case, seed: int) -> None:
    assert check_pairs(each.new_loop, each.expected, rounds=ROUNDS, new_tokens=each.new_tokens, seed=seed).exact


# Broken variants. Each is a way of getting it wrong that looks right.

Patches = Mapping[tuple[Any, str], Any]


def _same_uniform() -> Patches:
    """Acceptance and residual share their random number."""
    last: list[float] = []

    def remembered(generator: torch.Generator) -> float:
        last.append(uniform(generator))
        return last[-1]

    def drawn(probs: Tensor, generator: torch.Generator) -> int:
        cumulative = probs.double().cumsum(0)
        return min(int((cumulative <= last[-1] * float(cumulative[-1])).sum()), len(probs) - 1)

    return {(token, "uniform"): remembered, (token, "draw"): drawn}


def _by_probability(tree: DraftTree, node: int) -> list[int]:
    """Children, the draft's likeliest first."""
    found = [child for child, parent in enumerate(tree.parents) if parent == node]
    return sorted(found, key=lambda child: -float(tree.draft_probs[node][tree.tokens[child]]))


def _not_without(target: Tensor, draft: Tensor, refused: int) -> tuple[Tensor, Tensor]:
    """The draft keeps its refused children."""
    return normalised(target - draft, target), draft


_exact_division = k_seq.division
DISTINCT = {(k_seq, "in_random_order"): lambda drafts, generator: sorted(set(drafts))}
ALL_OF_THEM = {(k_seq, "division"): lambda draft, target, drafts: _exact_division(draft, target, SEQUENCES)}
COPY_AFTER_COPY = {(k_seq, "in_random_order"): lambda drafts, generator: drafts}
INDEPENDENT_TESTS = {(k_seq, "division"): lambda draft, target, drafts: Division(1.0, 0.0)}
REFUSED_STAY = {(recursive, "left_over"): _not_without}
BY_PROBABILITY = {(DraftTree, "children"): _by_probability}
UNWEIGHTED = {(block, "normalised"): lambda weights, otherwise: normalised(otherwise, otherwise)}


class StaleReader(TableReader):
    """Keeps one token too few in each round."""

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        super().commit([path[:-1] for path in paths])


class OtherBranch(SampleRule):
    """The token after the branch comes from the row of the last node, not of the branch's."""

    def walk(self, tree: DraftTree, target_probs: Tensor, generator: torch.Generator) -> Walk:
        found = super().walk(tree, target_probs, generator)
        return Walk(found.path, draw(target_probs[-1], generator)) if found.path else found


class GreedyChain(Chain):
    """Takes the likeliest token and says that it drew it."""

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        ((node, probs),) = leaves.items()
        tree.draft_probs[node] = probs
        return [tree.add(int(probs.argmax()), node)]


class SharperChain(Chain):
    """Draws at temperature 0.5 and keeps the distribution at 1."""

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        ((node, probs),) = leaves.items()
        tree.draft_probs[node] = probs
        return [tree.add(draw(probs**2, generator), node)]


class Blind(Distribution):
    """Transforms see the text alone, not the drafted tokens before a row."""

    def of_each(self, rows, prefixes):  # type: ignore[no-untyped-def]
        return super().of_each(rows, lambda text, row: prefixes(text, 0))


def stale(target: Any, rows: int) -> Reader:
    return StaleReader(target, rows)


def warp_alone(transforms: Sequence[LogitsTransform]) -> Distribution:
    return Distribution(transforms[-1:])


def mutant(proposer: Callable[[NewReader, Distribution], Any], rule: AcceptanceRule) -> Case:
    return case(lambda reader, d: (proposer(reader, d), rule), "plain")


class TopChildren(Likeliest):
    """Says that its children were drawn."""

    law: ClassVar[Law] = "gumbel_swor"


MUTANTS: dict[str, tuple[Case, Patches]] = {
    "multiset without its copies": (case("sequences", "plain"), DISTINCT),
    "rho of all sequences at every level": (case("sequences", "plain"), ALL_OF_THEM),
    "candidates copy after copy": (mutant(lambda r, d: Sequences(r, d, 2, 5), KSeqRule()), COPY_AFTER_COPY),
    "independent tests": (case("sequences", "plain"), INDEPENDENT_TESTS),
    "refused siblings stay, constant branching": (case("constant branching", "plain"), REFUSED_STAY),
    "refused siblings stay, beam": (case("stochastic beam", "plain"), REFUSED_STAY),
    "siblings by probability, constant branching": (case("constant branching", "plain"), BY_PROBABILITY),
    "siblings by probability, beam": (case("stochastic beam", "plain"), BY_PROBABILITY),
    "likeliest children as if drawn": (mutant(lambda r, d: TopChildren(r, d, 2, 2), RecursiveRule()), {}),
    "greedy draft with its softmax": (mutant(lambda r, d: GreedyChain(r, d, 2), TokenRule()), {}),
    "draft drawn sharper than it says": (mutant(lambda r, d: SharperChain(r, d, 2), TokenRule()), {}),
    "one random number for both": (case("chain", "plain"), _same_uniform()),
    "stale cache": (case("chain", "plain", target=stale), {}),
    "row of another branch": (mutant(lambda r, d: Likeliest(r, d, 2, 2), OtherBranch()), {}),
    "transforms without drafted tokens": (case("chain", "penalised", distribution=Blind), {}),
    "contrast left out": (
        case("stochastic beam", "dola", distribution=lambda transforms: Distribution(transforms[1:])),
        {},
    ),
    "share left out": (case("chain", "eft", distribution=lambda transforms: Distribution(transforms[1:])), {}),
    "block residual without its weight": (case("block", "plain"), UNWEIGHTED),
    "typical acceptance": (mutant(lambda r, d: Chain(r, d, 2), TypicalRule(0.09, 0.3)), {}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_variants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    each, patches = MUTANTS[name]
    for (owner, attribute), replacement in patches.items():
        monkeypatch.setattr(owner, attribute, replacement)
    tests = (check_pairs(each.new_loop, each.expected, rounds=rounds, new_tokens=3) for rounds in (2_000, FEW_ROUNDS))
    assert any(not test.exact for test in tests)


def test_a_rule_refuses_drafts_for_which_it_is_not_exact() -> None:
    def reader(rows: int) -> Reader:
        return TableReader(DRAFT, rows)

    plain = Distribution(TRANSFORMS["plain"])
    gumbel, drawn, named = (
        ConstantBranching(reader, plain, (2, 2)),
        Sequences(reader, plain, 2, 2),
        NgramLookup(2, 2),
    )
    for rule, proposer, said in (
        (
            KSeqRule(),
            gumbel,
            "KSeqRule is exact for drafts of the law iid, but ConstantBranching drafts by the law gumbel",
        ),
        (RecursiveRule(), drawn, "RecursiveRule is exact for drafts of the law gumbel_swor"),
        (TokenRule(), named, "TokenRule is exact for drafts of the law iid, but NgramLookup"),
        (BlockRule(), drawn, "BlockRule walks along chains, but Sequences drafts trees"),
        (SampleRule(), drawn, "SampleRule is exact for drafts of the law deterministic"),
    ):
        with pytest.raises(CompositionError, match=said):
            Loop(TableReader(DRAFT, 1), plain, proposer, rule)
