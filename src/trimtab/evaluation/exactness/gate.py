"""A chi-square test of the first two tokens that a decoding loop writes, against the exact joint distribution."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from trimtab.decoding._distribution import Distribution
from trimtab.decoding._loop import Loop
from trimtab.decoding._sampling import Sampling
from trimtab.evaluation.exactness.table import TableModel

ROUNDS = 60_000
LOWEST_P = 1e-4
_ROWS = 500
_PROMPT = 0


@dataclass(frozen=True, slots=True)
class PairTest:
    """Result for `rounds` texts: the p-value of the chi-square test, and the total variation distance."""

    p_value: float
    total_variation: float
    rounds: int

    @property
    def exact(self) -> bool:
        """Nothing speaks against the exact distribution."""
        return self.p_value > LOWEST_P


def exact_pairs(model: TableModel, distribution: Distribution) -> np.ndarray:
    """Joint probabilities [V, V] of the first two tokens, by enumeration."""
    size = model.vocabulary
    first = distribution(model.rows([[]]), lambda i: [_PROMPT])[0].double()
    second = distribution(model.rows([[token] for token in range(size)]), lambda i: [_PROMPT, i]).double()
    return (first[:, None] * second).numpy()


def check_pairs(
    new_loop: Callable[[int], Loop],
    expected: np.ndarray,
    *,
    rounds: int = ROUNDS,
    new_tokens: int = 2,
    seed: int = 0,
    sampling: Sampling | None = None,
) -> PairTest:
    """Write `rounds` texts and compare how often each pair of first tokens came.

    new_loop     a loop for so many texts, all of one model
    expected     joint probabilities, as `exact_pairs` gives them
    new_tokens   of each text: with more than two, drafts may reach over the pair's end
    """
    counts = np.zeros_like(expected)
    with _young_garbage_only():
        for batch in range(-(-rounds // _ROWS)):
            own = Sampling(temperature=1.0, max_new_tokens=new_tokens, seed=seed * 10_007 + batch)
            done = new_loop(_ROWS).run([[_PROMPT]] * _ROWS, own)
            pairs = torch.tensor([tokens[:2] for tokens in done.tokens]).numpy()
            np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return _test(counts, expected)


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """The collector leaves out what was there before: the thousands of small trees of a batch call it often, and going
    through all of torch's objects each time takes as long as the decoding."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _test(counts: np.ndarray, expected: np.ndarray) -> PairTest:
    total = counts.sum()
    seen, wanted = counts.ravel(), expected.ravel() / expected.sum()
    if bool((seen[wanted * total < 1e-3] > 0).any()):
        return PairTest(0.0, float(np.abs(seen / total - wanted).sum() / 2), int(total))
    # cells that hardly ever occur are one cell: the test wants five or so in each
    rare = wanted * total < 5
    cells = np.append(seen[~rare], seen[rare].sum())
    hoped = np.append(wanted[~rare], wanted[rare].sum()) * total
    kept = hoped > 0
    p_value = stats.chisquare(cells[kept], hoped[kept] * cells.sum() / hoped[kept].sum()).pvalue
    return PairTest(float(p_value), float(np.abs(seen / total - wanted).sum() / 2), int(total))
