"""Claims of SpecTr: exact, more tokens than a chain, close to what any use of independent drafts can reach."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from trimtab.claims._drafts import MEASURED, ON_TABLES, accepted, exact_on_tables, figures
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Spectr, Speculative
from trimtab.decoding._rules.k_seq import division
from trimtab.evaluation.acceptance import DRAFT

__all__ = ["CLAIMS"]

K, DEPTH = 8, 4
PAIRS, TOKENS, DRAFTS = 300, 6, 3


def exact() -> Outcome:
    return exact_on_tables(Spectr(draft=DRAFT, k=3, depth=2))


def more_than_a_chain() -> Outcome:
    several, chain = accepted(Spectr(draft=DRAFT, k=K, depth=DEPTH)), accepted(Speculative(draft=DRAFT, depth=DEPTH))
    gain = several.gain(chain)
    return Outcome(
        measured=figures("spectr", several) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=figures("chain", chain),
        holds=gain.low > 0,
    )


def close_to_the_optimum() -> Outcome:
    """The optimum by brute force: 1 + min over sets S of q(S) - p(S)^K."""
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=TOKENS)), dtype=torch.float64)
    random = np.random.default_rng(0)
    shares, chains = [], []
    for _ in range(PAIRS):
        p, q = torch.tensor(random.dirichlet([0.7] * TOKENS, size=2))
        optimum = float(1 + (sets @ q - (sets @ p) ** DRAFTS).min())
        shares.append(division(p, q, DRAFTS).accepted / optimum)
        chains.append(float(torch.minimum(p, q).sum()) / optimum)
    return Outcome(
        measured={"lowest_share_of_optimum": min(shares), "mean_share_of_optimum": float(np.mean(shares))},
        baseline={"lowest_share_one_draft": min(chains), "mean_share_one_draft": float(np.mean(chains))},
        holds=min(shares) >= 1 - np.exp(-1) and max(shares) <= 1 + 1e-9,
    )


_PAPER = method_info("spectr").paper

CLAIMS = (
    Claim(
        "spectr",
        _PAPER,
        "Several drafts per position, coupled by k-SEQ, leave the distribution of the large model as it is.",
        f"{ON_TABLES}, and the test refuses the baseline, typical acceptance.",
        exact,
    ),
    Claim(
        "spectr",
        _PAPER,
        "At equal depth, 8 sequences write more tokens per forward pass than one (3.1 against 2.4 at depth 4).",
        f"{MEASURED}, {K} sequences of {DEPTH} against a chain of {DEPTH}, the baseline. Holds if the paired 95 % "
        "interval of the gain lies above zero.",
        more_than_a_chain,
    ),
    Claim(
        "spectr",
        _PAPER,
        "k-SEQ accepts at least 1 - 1/e of what the best coupling of independent drafts can.",
        f"{PAIRS} random pairs of distributions over {TOKENS} tokens, {DRAFTS} drafts, optimum by brute force. Holds "
        "if no share of the optimum is below 1 - 1/e. Baseline: one draft.",
        close_to_the_optimum,
    ),
)
