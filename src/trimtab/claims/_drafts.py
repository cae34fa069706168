"""What the claims of drafting methods share: `ref` with `ref-mini` as its draft, and tables that are exact.

Results are kept while the process lives.
"""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from trimtab.claims.base import Outcome
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._loop import Loop
from trimtab.decoding.base import DecodingMethod, DraftSetting
from trimtab.evaluation.acceptance import (
    DRAFT,
    NEW_TOKENS,
    PROMPT_TOKENS,
    TARGET,
    Acceptance,
    acceptance,
    prose_prompts,
)
from trimtab.evaluation.exactness import PairTest, TableModel, check_pairs, exact_pairs
from trimtab.evaluation.exactness.gate import LOWEST_P
from trimtab.evaluation.exactness.table import TableReader
from trimtab.models import load

ROUNDS = 20_000
TEXTS = 96
MEASURED = (
    f"{TARGET} with {DRAFT} as its draft, {TEXTS} beginnings of held-out prose of {PROMPT_TOKENS} tokens, "
    f"{NEW_TOKENS} new ones at temperature 1"
)
ON_TABLES = (
    f"Two tables of five tokens as target and draft, {ROUNDS:,} texts, the first two tokens against their exact joint "
    "distribution by a chi-square test. Holds if p > 0.0001"
)


@functools.cache
def _model(name: str) -> PreTrainedModel:
    return load(name, dtype=torch.float32)


@functools.cache
def accepted(method: DecodingMethod) -> Acceptance:
    """Tokens per forward pass at temperature 1; methods are comparable text by text."""
    target = _model(TARGET)
    sampling = Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS)
    return acceptance(target, method, prose_prompts(target, TEXTS), sampling, {DRAFT: _model(DRAFT)})


def greedy_texts(*methods: DecodingMethod) -> list[list[int]]:
    """What is written at temperature 0."""
    target = _model(TARGET)
    decoder = Decoder(target, methods, drafts={DRAFT: _model(DRAFT)}, adapt=False)
    return decoder.generate(prose_prompts(target, TEXTS), Sampling(max_new_tokens=NEW_TOKENS)).tokens


@functools.cache
def on_tables(method: DecodingMethod) -> PairTest:
    """The method with tables as target and draft, against exact enumeration."""
    target, draft = TableModel(0), TableModel(1)
    sampling = Sampling(temperature=1.0)

    def new_loop(rows: int) -> Loop:
        setting = DraftSetting(
            sampling,
            lambda name: lambda count: TableReader(draft, count),
            lambda temperature: Distribution([Warp(sampling.at(temperature))]),
        )
        drafting = method.drafting(setting)
        assert drafting is not None, "a method that drafts"
        return Loop(TableReader(target, rows), Distribution([Warp(sampling)]), drafting.proposer, drafting.rule)

    expected = exact_pairs(target, Distribution([Warp(sampling)]))
    return check_pairs(new_loop, expected, rounds=ROUNDS, new_tokens=3)


def figures(name: str, found: Acceptance) -> dict[str, float]:
    """As an outcome shows them."""
    return {
        f"tokens_per_target_forward_{name}": found.estimate.value,
        f"nodes_per_forward_{name}": found.nodes_per_forward,
    }


def exact_on_tables(method: DecodingMethod) -> Outcome:
    """Holds if the method follows the exact distribution and the baseline, typical acceptance, is found not to."""
    exact, lossy = on_tables(method), on_tables(Speculative(draft=DRAFT, depth=2, rule="typical"))
    return Outcome(
        measured={"p_value": exact.p_value, "total_variation": exact.total_variation},
        baseline={
            "p_value_typical_acceptance": lossy.p_value,
            "total_variation_typical_acceptance": lossy.total_variation,
        },
        holds=exact.p_value > LOWEST_P >= lossy.p_value,
    )
