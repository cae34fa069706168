"""The allocator against brute force, and what must be true of every choice it makes."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from trimtab.core.errors import BudgetError, ConfigError, NumericsError
from trimtab.weights import _allocation
from trimtab.weights._allocation import allocate, smallest, undominated

Row = list[tuple[float, int]]
ROWS = st.lists(st.tuples(st.floats(0, 1e3, width=32), st.integers(1, 60)), min_size=1, max_size=5)
TABLES = st.lists(ROWS, min_size=1, max_size=4)


def split(table: list[Row]) -> tuple[list[list[float]], list[list[int]]]:
    return [[cost for cost, _ in row] for row in table], [[size for _, size in row] for row in table]


def best(table: list[Row], budget: int) -> float:
    """Brute force: the least cost of any choice within the budget; infinity if there is none."""
    found = [
        math.fsum(cost for cost, _ in choice)
        for choice in itertools.product(*table)
        if sum(size for _, size in choice) <= budget
    ]
    return min(found, default=math.inf)


@given(table=TABLES, budget=st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_is_as_good_as_brute_force(table: list[Row], budget: int) -> None:
    costs, sizes = split(table)
    expected = best(table, budget)
    if math.isinf(expected):
        with pytest.raises(BudgetError, match=f"the smallest choice takes {smallest(sizes):,}"):
            allocate(costs, sizes, budget)
        return
    found = allocate(costs, sizes, budget)
    assert found.size <= budget
    assert found.size == sum(sizes[i][c] for i, c in enumerate(found.choices))
    assert found.cost == pytest.approx(math.fsum(costs[i][c] for i, c in enumerate(found.choices)))
    assert found.cost == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found.gap == 0


def large_table(seed: int = 0, matrices: int = 60, ways: int = 24) -> tuple[list[list[float]], list[list[int]]]:
    """Matrices of three sizes and uneven importance: cost falls fourfold a bit, with some noise."""
    random = np.random.default_rng(seed)
    bits = np.sort(random.uniform(2, 8, ways))
    numel = random.choice([65536, 180224, 360448], matrices)
    weight = 10 ** random.uniform(-3, 0, matrices)
    noise = random.uniform(0.8, 1.25, (matrices, ways))
    costs = weight[:, None] * 4.0 ** -bits[None] * noise
    return costs.tolist(), (numel[:, None] * bits[None] / 8).astype(int).tolist()


def test_beats_every_uniform_configuration_of_its_size() -> None:
    costs, sizes = large_table()
    for way in range(len(costs[0])):
        budget = sum(row[way] for row in sizes)
        found = allocate(costs, sizes, budget)
        assert found.size <= budget
        assert found.cost <= sum(row[way] for row in costs) + 1e-12


def test_a_larger_budget_never_costs_more() -> None:
    costs, sizes = large_table(1)
    least, most = smallest(sizes), sum(max(row) for row in sizes)
    found = [allocate(costs, sizes, int(least + share * (most - least))).cost for share in np.linspace(0, 1, 15)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found))
    assert found[-1] == pytest.approx(sum(min(row) for row in costs))


def greedy(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """A broken variant: each matrix in turn takes the best that still leaves room for the rest."""
    left, total = budget - smallest(sizes), 0.0
    for cost, size in zip(costs, sizes, strict=True):
        fitting = [i for i in range(len(cost)) if size[i] - min(size) <= left]
        chosen = min(fitting, key=lambda i: cost[i])
        left -= size[chosen] - min(size)
        total += cost[chosen]
    return total


def test_the_comparison_with_uniform_notices_a_greedy_allocator() -> None:
    costs, sizes = large_table()
    way = len(costs[0]) // 2
    assert greedy(costs, sizes, sum(row[way] for row in sizes)) > sum(row[way] for row in costs)


def test_costs_may_have_any_scale() -> None:
    costs, sizes = large_table(2)
    budget = int(1.4 * smallest(sizes))
    expected = allocate(costs, sizes, budget).choices
    for scale in (1e-12, 1e12):
        assert allocate([[scale * c for c in row] for row in costs], sizes, budget).choices == expected


def test_dominated_configurations_are_dropped() -> None:
    #        fits  worse  equal cost, larger   better  as large, worse
    costs = [5.0, 6.0, 5.0, 1.0, 2.0]
    sizes = [10, 10, 20, 30, 30]
    assert undominated(costs, sizes) == [0, 3]


def test_dropping_them_changes_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, sizes = large_table(3, matrices=12, ways=10)
    budget = int(1.5 * smallest(sizes))
    found = allocate(costs, sizes, budget)
    monkeypatch.setattr(_allocation, "undominated", lambda cost, size: list(range(len(cost))))
    assert allocate(costs, sizes, budget).cost == pytest.approx(found.cost)


def test_a_budget_is_not_exceeded_by_the_solvers_tolerance() -> None:
    """Sizes of billions of bytes with no common divisor: one byte is far below what the solver tells apart."""
    sizes = [[1_000_000_007, 3_000_000_019], [1_000_000_009, 3_000_000_033]]
    costs = [[1.0, 0.0], [1.0, 0.1]]
    exact = sizes[0][1] + sizes[1][0]
    assert allocate(costs, sizes, exact).choices == (1, 0)
    found = allocate(costs, sizes, exact - 1)
    assert found.size <= exact - 1


def test_tables_that_do_not_fit_are_refused() -> None:
    for costs, sizes in (([], []), ([[1.0]], [[1, 2]]), ([[]], [[]])):
        with pytest.raises(ConfigError, match="the allocator wants"):
            allocate(costs, sizes, 5)
    with pytest.raises(NumericsError, match="for matrix 1"):
        allocate([[1.0], [math.nan]], [[1], [1]], 5)


def test_the_solver_writes_nothing_to_standard_output(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Commands write one JSON document there."""
    solve = _allocation.milp

    def talkative(*arguments: Any, **options: Any) -> Any:
        libc = ctypes.CDLL(None)
        libc.printf(b"something of the library's own\n")
        return solve(*arguments, **options)

    monkeypatch.setattr(_allocation, "milp", talkative)
    costs, sizes = large_table(matrices=4)
    allocate(costs, sizes, sum(max(own) for own in sizes))
    ctypes.CDLL(None).fflush(None)
    print("still there", flush=True)
    assert capfd.readouterr().out == "still there\n"
