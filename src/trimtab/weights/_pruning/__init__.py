"""Pruning, as six choices that mix: Site -> Stats -> Score -> Select -> Repair -> Apply.

    site, stats    trimtab.models: a distinct linear input, and what was gathered of it
    units.py       which entries of which linears are removed together (a `UnitMap`), and how their scores add up
    selection.py   which units go, by score: within a row, a matrix, a group of m, or over everything; exact counts
    allocation.py  how many units go where: uniform, by one threshold, by the softmax of layer scores
    repair.py      what the kept weights become: least squares on the Gram matrix
    plan.py        what was decided, as a table that can be stored, compared, merged and applied again

Scores and factors that are more than a line: nystrom.py (neurons), rotary_selection.py (pairs of a head),
value_factors.py (values and outputs of few directions), narrow_heads.py (these two on the linears of an attention).

The methods are files of the room (`magnitude`, `wanda`, ...): each supplies a score, and names its defaults for the
rest (`weights/_pruner.py`). What a pruned linear becomes is a part: `tensors/bitmap.py`, `tensors/sparse_grid.py`.
"""
