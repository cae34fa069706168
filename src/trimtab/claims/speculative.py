"""Claims of speculative sampling: nothing changes but the number of forward passes, which a formula foretells."""

from __future__ import annotations

from trimtab.claims._drafts import MEASURED, ON_TABLES, accepted, figures, greedy_texts, on_tables
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Speculative
from trimtab.evaluation.acceptance import DRAFT
from trimtab.evaluation.exactness.gate import LOWEST_P

__all__ = ["CLAIMS"]

DEPTH = 4
TOLERANCE = 0.1
CHAIN = Speculative(draft=DRAFT, depth=DEPTH)
BLOCK = Speculative(draft=DRAFT, depth=DEPTH, rule="block")
BLOCK_PAPER = (
    "Ziteng Sun, Uri Mendlovic, Yaniv Leviathan, Asaf Aharoni, Jae Hun Ro, Ahmad Beirami, Ananda Theertha Suresh, "
    '"Block Verification Accelerates Speculative Decoding", ICLR 2025, arXiv:2403.10444.'
)


def nothing_changes() -> Outcome:
    exact, lossy = on_tables(CHAIN), on_tables(Speculative(draft=DRAFT, depth=DEPTH, rule="typical"))
    same = greedy_texts(CHAIN) == greedy_texts()
    return Outcome(
        measured={
            "p_value": exact.p_value,
            "total_variation": exact.total_variation,
            "greedy_texts_equal": float(same),
        },
        baseline={
            "p_value_typical_acceptance": lossy.p_value,
            "total_variation_typical_acceptance": lossy.total_variation,
        },
        holds=exact.p_value > LOWEST_P >= lossy.p_value and same,
    )


def the_formula_foretells_it() -> Outcome:
    found = accepted(CHAIN)
    ledger = found.ledger
    # a drafted token is tested if all before it were accepted: the first of each round, and those after accepted ones
    tested = ledger.rounds + sum(ledger.accepted_by_depth[: DEPTH - 1])
    beta = sum(ledger.accepted_by_depth) / tested
    foretold = (1 - beta ** (DEPTH + 1)) / (1 - beta)
    return Outcome(
        measured=figures("chain", found) | {"acceptance": beta, "foretold": foretold},
        baseline={"tokens_per_target_forward_plain": 1.0},
        holds=found.estimate.low > 1 and abs(foretold / ledger.tokens_per_target_forward - 1) < TOLERANCE,
    )


def blocks_are_no_worse() -> Outcome:
    block, chain = accepted(BLOCK), accepted(CHAIN)
    gain = block.gain(chain)
    return Outcome(
        measured=figures("block", block) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=figures("token", chain),
        holds=gain.high >= 0 and on_tables(BLOCK).exact,
    )


_PAPER = method_info("speculative").paper

CLAIMS = (
    Claim(
        "speculative",
        _PAPER,
        "The text follows exactly the distribution of the large model.",
        f"{ON_TABLES}, greedy decoding of {DRAFT}'s drafts by ref gives the text of plain decoding on held-out prose, "
        "and the test refuses the baseline, typical acceptance.",
        nothing_changes,
    ),
    Claim(
        "speculative",
        _PAPER,
        "A round writes (1 - beta^(depth + 1)) / (1 - beta) tokens, beta being the chance of accepting a token.",
        f"{MEASURED}, chains of {DEPTH}. Holds if the formula, with the share of tested tokens that were accepted, is "
        f"within {TOLERANCE:.0%} of the tokens per forward pass, which are more than plain decoding's 1, the baseline.",
        the_formula_foretells_it,
    ),
    Claim(
        "speculative",
        BLOCK_PAPER,
        "Accepting chains by blocks writes no fewer tokens than accepting token by token, of the same distribution.",
        f"{MEASURED}, chains of {DEPTH}, against the token rule, the baseline. Holds if the paired 95 % interval of "
        "the gain does not lie below zero, and the exact distribution of tables is met.",
        blocks_are_no_worse,
    ),
)
