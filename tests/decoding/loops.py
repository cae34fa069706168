"""Every way of decoding that claims exactness, on tables: drafts with their rules, crossed with what is decoded.

A line in DRAFTS or TRANSFORMS puts another through the gate of test_exactness.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.decoding._distribution import Distribution, LogitsTransform, Warp
from trimtab.decoding._loop import Loop, NoDraft
from trimtab.decoding._proposers.base import ModelProposer, Proposer
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._proposers.gumbel import ConstantBranching, StochasticBeam
from trimtab.decoding._proposers.ngram import NgramLookup
from trimtab.decoding._proposers.sequences import Sequences
from trimtab.decoding._reader import Reader, Rows
from trimtab.decoding._rules.base import AcceptanceRule
from trimtab.decoding._rules.block import BlockRule
from trimtab.decoding._rules.k_seq import KSeqRule
from trimtab.decoding._rules.recursive import RecursiveRule
from trimtab.decoding._rules.token import SampleRule, TokenRule
from trimtab.decoding._sampling import Sampling
from trimtab.decoding._transforms.dola import DolaTransform
from trimtab.decoding._transforms.eft import TUNED, UNTUNED, EftTransform
from trimtab.decoding._tree import DraftTree, Law
from trimtab.evaluation.exactness import TableModel, exact_pairs
from trimtab.evaluation.exactness.table import TableReader
from trimtab.models.early_exits import Exit

EXITS = (Exit(1), Exit(2))
OTHERS = {TUNED: TableModel(2), UNTUNED: TableModel(3)}


class Companied(TableModel):
    """A table with early exits, and with what other models say beside it."""

    def rows(self, new: Sequence[Sequence[int]]) -> Rows:
        return replace(super().rows(new), others={name: own.rows(new).logits for name, own in OTHERS.items()})


TARGET, DRAFT = Companied(0, early=EXITS), TableModel(1)
SEQUENCES = 3
NewReader = Callable[[int], Reader]


class Likeliest(ModelProposer):
    """The `count` likeliest children of every node: named, not drawn."""

    law: ClassVar[Law] = "deterministic"
    branches: ClassVar[bool] = True

    def __init__(self, new_reader: NewReader, distribution: Distribution, depth: int, count: int) -> None:
        super().__init__(new_reader, distribution, depth)
        self._count = count

    def grow(self, tree: DraftTree, leaves: Mapping[int, Tensor], level: int, generator: torch.Generator) -> list[int]:
        new = []
        for node, probs in leaves.items():
            tree.draft_probs[node] = probs
            for rank, token in enumerate(probs.topk(self._count).indices.tolist()):
                new.append(tree.add(token, node, rank=rank))
        return new


Drafting = Callable[[NewReader, Distribution], tuple[Proposer, AcceptanceRule]]
DRAFTS: dict[str, Drafting] = {
    "none": lambda reader, d: (NoDraft(), SampleRule()),
    "chain": lambda reader, d: (Chain(reader, d, 2), TokenRule()),
    "stopped chain": lambda reader, d: (Chain(reader, d, 2, stop_below=0.5), TokenRule()),
    "block": lambda reader, d: (Chain(reader, d, 2), BlockRule()),
    "stopped block": lambda reader, d: (Chain(reader, d, 2, stop_below=0.5), BlockRule()),
    "sequences": lambda reader, d: (Sequences(reader, d, 2, SEQUENCES), KSeqRule()),
    "one sequence": lambda reader, d: (Sequences(reader, d, 2, 1), KSeqRule()),
    "constant branching": lambda reader, d: (ConstantBranching(reader, d, (2, 2)), RecursiveRule()),
    "stochastic beam": lambda reader, d: (StochasticBeam(reader, d, 2, 3), RecursiveRule()),
    "named tree": lambda reader, d: (Likeliest(reader, d, 2, 2), SampleRule()),
    "n-grams": lambda reader, d: (NgramLookup(2, 2), SampleRule()),
}
"""Name -> (draft's reader, its distribution) -> proposer and rule."""

TRANSFORMS: dict[str, tuple[LogitsTransform, ...]] = {
    "plain": (Warp(Sampling(temperature=1.0)),),
    "warped": (Warp(Sampling(temperature=1.5, top_k=4, top_p=0.9, min_p=0.05)),),
    "penalised": (Warp(Sampling(temperature=1.0, repetition_penalty=1.6)),),
    "dola": (DolaTransform(EXITS, relative_top=0.02), Warp(Sampling(temperature=1.0))),
    "eft": (EftTransform(0.7), Warp(Sampling(temperature=1.0))),
}
"""What is decoded; the draft has the same warp, and nothing else of it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """new_loop: for so many texts; expected: exact joint probabilities of the first two tokens; new_tokens: to write,
    so many that the trees reach over the pair's end."""

    name: str
    new_loop: Callable[[int], Loop]
    expected: np.ndarray
    new_tokens: int = 3

    def __str__(self) -> str:
        return self.name


def case(
    drafts: str | Drafting,
    transforms: str,
    *,
    target: Callable[[TableModel, int], Reader] = TableReader,
    distribution: Callable[[tuple[LogitsTransform, ...]], Distribution] = Distribution,
) -> Case:
    """These drafts under these transforms; with a target's reader, or a distribution, of one's own."""
    drafting = DRAFTS[drafts] if isinstance(drafts, str) else drafts

    def new_loop(rows: int) -> Loop:
        proposer, rule = drafting(lambda n: TableReader(DRAFT, n), Distribution(TRANSFORMS[transforms][-1:]))
        return Loop(target(TARGET, rows), distribution(TRANSFORMS[transforms]), proposer, rule)

    expected = exact_pairs(TARGET, Distribution(TRANSFORMS[transforms]))
    return Case(
        name=f"{drafts if isinstance(drafts, str) else 'own'}, {transforms}", new_loop=new_loop, expected=expected
    )


CASES = [case(drafts, transforms) for drafts in DRAFTS for transforms in TRANSFORMS]
