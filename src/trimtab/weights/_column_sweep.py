"""Change a weight column by column and push each column's error into the columns still to come.

What GPTQ (rounding) and SparseGPT (removing) share: the greedy minimisation of `tr((W~ - W) H (W~ - W)^T)`, all rows at
once. With `H^-1 = U^T U`, U upper triangular, and the columns taken from left to right,

    e_i  = (w_i - w~_i) / U_ii            w~_i: what the method makes of column i, as it is by then
    w_j -= e_i U_ij                       for all j > i
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sweep(columns: Tensor, upper: Tensor, block_end: Callable[[int], int], settle: Callable[[int], Tensor]) -> float:
    """Settle all columns; half of the objective that is reached, the sum of all e_i^2.

    columns      [in, out] float32, a column of the weight in each row; holds the corrected weights, and is overwritten
    upper        U [in, in]
    block_end    start -> stop of the block that begins there: its columns get corrections at once, those behind it when
                 it ends. Speed only, unless `settle` reads columns further on
    settle       i -> w~_i [out], to be computed from `columns`; called once for each i, in order
    """
    errors = torch.empty_like(columns)
    inverse_pivots = (1 / upper.diagonal()).tolist()
    start, end = 0, len(columns)
    while start < end:
        stop = block_end(start)
        for i in range(start, stop):
            torch.sub(columns[i], settle(i), out=errors[i])
            errors[i] *= inverse_pivots[i]
            columns[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
        start = stop
    return float(errors.double().square().sum()) / 2
