"""The allocator: one configuration for each matrix, at the least total cost that fits into a number of bytes.

It knows nothing of models or representations: a table of costs and sizes comes in, choices go out.

    minimise  sum_i cost[i][c_i]    subject to    sum_i size[i][c_i] <= budget

An integer program (a multiple-choice knapsack), solved exactly by HiGHS. Configurations that another one of the same
matrix beats in both cost and size are dropped first, which leaves a few of many; sizes are counted from the smallest
configuration of each matrix, in units of their common divisor, and costs relative to the largest, so that numbers are
well scaled; the constraint matrix is sparse.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from trimtab.core.errors import BudgetError, ConfigError, NumericsError

SECONDS = 60.0
_TIME_LIMIT = 1  # scipy's status of a search that was stopped


@dataclass(frozen=True, slots=True)
class Allocation:
    """choices: index of the configuration of each matrix; cost and size are their sums.

    gap    how far, relative to the cost, a better choice could be: 0 unless the search was stopped for time
    """

    choices: tuple[int, ...]
    cost: float
    size: int
    gap: float = 0.0


def smallest(sizes: Sequence[Sequence[int]]) -> int:
    """The least budget that anything fits into."""
    return sum(min(row) for row in sizes)


def undominated(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Indices of the configurations of one matrix that no other beats or equals in both, by increasing size."""
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i], i)):
        if not kept or costs[index] < costs[kept[-1]]:
            kept.append(index)
    return kept


def allocate(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, seconds: float = SECONDS
) -> Allocation:
    """The cheapest choice of at most `budget`; `costs[i][c]` and `sizes[i][c]` (whole numbers) of matrix i.

    Matrices may have different numbers of configurations. Equal inputs give equal choices. Raises BudgetError naming
    the smallest possible budget, ConfigError for tables that do not fit together, NumericsError for a cost that is
    not a number.
    """
    _check(costs, sizes)
    least = smallest(sizes)
    if least > budget:
        raise BudgetError(f"nothing fits into {budget:,}: the smallest choice takes {least:,}.")
    kept = [undominated(row, size) for row, size in zip(costs, sizes, strict=True)]
    extra = [sizes[i][c] - min(sizes[i]) for i, row in enumerate(kept) for c in row]
    unit = math.gcd(*extra) or 1
    slots = np.repeat(np.arange(len(kept)), [len(row) for row in kept])
    cost = np.array([costs[i][c] for i, row in enumerate(kept) for c in row], dtype=np.float64)
    size = np.array(extra, dtype=np.float64) / unit
    choices, gap = _solve(cost, size, slots, (budget - least) // unit, seconds)
    picked = tuple(kept[i][c] for i, c in enumerate(choices))
    return Allocation(
        picked,
        math.fsum(costs[i][c] for i, c in enumerate(picked)),
        sum(sizes[i][c] for i, c in enumerate(picked)),
        gap,
    )


def _solve(cost: np.ndarray, size: np.ndarray, slots: np.ndarray, room: int, seconds: float) -> tuple[list[int], float]:
    """Which of its configurations each slot takes, and the gap; the entries of a slot lie side by side."""
    count = int(slots[-1]) + 1
    largest = float(np.abs(cost).max()) or 1.0
    one_each = csr_matrix((np.ones(len(slots)), (slots, np.arange(len(slots)))), shape=(count, len(slots)))
    first = np.searchsorted(slots, np.arange(count))
    tightened = room
    while True:
        scale = float(max(tightened, 1))
        lower = np.concatenate([np.ones(count), [-np.inf]])
        upper = np.concatenate([np.ones(count), [tightened / scale]])
        constraint = LinearConstraint(vstack([one_each, csr_matrix(size[None] / scale)]), lower, upper)
        options = {"mip_rel_gap": 0.0, "time_limit": seconds}
        with _silent_library():
            found = milp(cost / largest, constraints=constraint, integrality=1, bounds=Bounds(0, 1), options=options)
        if found.x is None:
            if found.status == _TIME_LIMIT:
                raise NumericsError(f"the allocator found no choice within {seconds:g} s for {count} matrices.")
            raise NumericsError(f"the allocator could not solve its integer program: {found.message}")
        ends = np.append(first[1:], len(slots))
        choices = [int(found.x[a:b].argmax()) for a, b in zip(first, ends, strict=True)]
        over = int(sum(size[a + c] for a, c in zip(first, choices, strict=True))) - room
        if over <= 0:
            return choices, max(0.0, float(found.mip_gap or 0.0))
        tightened -= over  # within the solver's tolerance of the budget, but above it


def _check(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> None:
    if not costs or [len(row) for row in costs] != [len(row) for row in sizes] or not all(costs):
        raise ConfigError(
            f"the allocator wants a cost and a size of each configuration, and at least one per matrix; it got "
            f"{[len(row) for row in costs]} costs and {[len(row) for row in sizes]} sizes."
        )
    for index, row in enumerate(costs):
        if not all(math.isfinite(cost) for cost in row):
            raise NumericsError(f"the allocator got costs {list(row)} for matrix {index}; they must be numbers.")


@contextmanager
def _silent_library() -> Iterator[None]:
    """HiGHS writes a line of its own to standard output now and then, where a command's JSON document goes."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # what C still holds back would come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
