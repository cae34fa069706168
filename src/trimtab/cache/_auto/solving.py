"""One candidate for the keys and one for the values of every head, at the least error that fits into the budget."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from trimtab.core.errors import BudgetError, NumericsError


def choose(errors: Tensor, bits: Tensor, budget_bits: float) -> tuple[list[int], float]:
    """For each of the S slots one of the C candidates: the least sum of errors with mean bits <= budget_bits.

    Returns the choices and that sum.
    errors [S, C], bits [S, C] per element; all slots hold as many elements. An integer program, solved to optimality by
    HiGHS. Raises BudgetError, naming the smallest budget, if not even the smallest candidates fit.
    """
    slots, ways = errors.shape
    least = float(bits.min(dim=1).values.mean())
    if least > budget_bits:
        raise BudgetError(f"no choice keeps {budget_bits:g} bits per element; the smallest takes {least:.2f}.")
    cost = (errors / errors.max().clamp(min=1e-30)).double().flatten().numpy()
    spent = bits.double().flatten().numpy()[None] / slots
    rows = np.repeat(np.arange(slots), ways)
    one_each = csr_matrix((np.ones(slots * ways), (rows, np.arange(slots * ways))), shape=(slots, slots * ways))
    lower = np.concatenate([np.ones(slots), [-np.inf]])
    upper = np.concatenate([np.ones(slots), [budget_bits]])
    constraint = LinearConstraint(vstack([one_each, csr_matrix(spent)]), lower, upper)
    options = {"mip_rel_gap": 1e-4, "time_limit": 30.0}
    found = milp(cost, constraints=constraint, integrality=np.ones_like(cost), bounds=Bounds(0, 1), options=options)
    if found.x is None:
        raise NumericsError(f"the budget of the cache could not be solved: {found.message}")
    picked = [int(i) for i in found.x.reshape(slots, ways).argmax(axis=1)]
    return picked, float(errors[range(slots), picked].sum())
