"""What the kept weights become once others are gone: least squares on the Gram matrix of the inputs.

With H = E[x x^T], `|X (W - V)^T|^2` is smallest over V with support S, for each row on its own, at

    V[:, S] = W H[:, S] (H[S, S])^-1

so rows with one support share one solve (`repair_ls`), rows with their own cost one each (`repair_ls_rows`).
`remove_by_sweep` approximates the latter at the price of one factorisation, and can choose what to remove on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.tensors.metric import InverseCholesky
from trimtab.tensors.sparse_grid import group_scales, rounded
from trimtab.weights._column_sweep import sweep

_ESCALATIONS = 6
_CHUNK_BYTES = 1 << 28  # of stacked systems that are solved at once


def repair_ls(weight: Tensor, gram: Tensor, keep: Tensor, damp: float = 1e-6) -> Tensor:
    """The best weight [out, kept] on the kept inputs, for all rows together; float64 inside, float32 out.

    weight    [out, in]
    gram      [in, in], symmetric, any positive scaling of E[x x^T]
    keep      bool [in]
    damp      added to the diagonal, as a share of its mean; up to a million times as much where that is singular

    Raises ConfigError for shapes that do not fit, NumericsError for a Gram matrix that is far from positive
    semidefinite.
    """
    _check(weight, gram, keep, (weight.shape[1],))
    wide, weight = gram.double(), weight.double()
    kept = wide[keep][:, keep]
    # solve for the change: what is kept stays exactly as it is where the removed inputs were uncorrelated with it
    lower = damped_factor(kept[None], damp, float(wide.diagonal().mean()))[0]
    change = torch.cholesky_solve((weight[:, ~keep] @ wide[~keep][:, keep]).T, lower).T
    return (weight[:, keep] + change).float()


def repair_ls_rows(weight: Tensor, gram: Tensor, keep: Tensor, damp: float = 1e-6) -> Tensor:
    """The best weight [out, in] with zeros where `keep` (bool [out, in]) is false; otherwise as `repair_ls`.

    Cost: one factorisation of [in, in] per row, O(out in^3). Rows are solved in batches, in float64.
    """
    _check(weight, gram, keep, tuple(weight.shape))
    wide = gram.double()
    mean = float(wide.diagonal().mean())
    rows_at_once = max(1, _CHUNK_BYTES // (8 * wide.numel()))
    repaired = []
    for rows, mask in zip(torch.split(weight.double(), rows_at_once), torch.split(keep, rows_at_once), strict=True):
        both = mask[:, :, None] & mask[:, None, :]
        system = torch.where(both, wide, 0.0)
        system.diagonal(dim1=1, dim2=2)[~mask] = mean or 1.0  # removed entries: rows of their own, whose solution is 0
        target = torch.where(mask, torch.where(mask, 0.0, rows) @ wide, 0.0)
        change = torch.cholesky_solve(target[..., None], damped_factor(system, damp, mean))[..., 0]
        repaired.append(torch.where(mask, rows + change, 0.0).float())
    return torch.cat(repaired)


Choose = Callable[[int, Tensor], Tensor]
"""(first column, scores [columns, out]) -> bool [columns, out], true at what is removed of these columns."""


@dataclass(frozen=True, slots=True)
class Swept:
    """A weight float32 [out, in] with zeros, what is kept of it bool [out, in], half of the objective that was reached,
    and the scales bfloat16 [out, groups] on whose grid it is, if it was rounded."""

    weight: Tensor
    keep: Tensor
    loss: float
    scales: Tensor | None


def remove_by_sweep(
    weight: Tensor,
    inverse: InverseCholesky,
    choose: Choose,
    *,
    choice_size: int,
    block_size: int,
    rounded_group: int | None = None,
) -> Swept:
    """Remove entries column by column, correcting the columns still to come (SparseGPT, arXiv:2301.00774).

    weight         [out, in]; entries of dead columns count as zero
    inverse        of the Gram matrix of the inputs
    choose         called before every `choice_size` columns with the cost w^2 / U_jj^2 of removing each entry of them,
                   as they are by then
    block_size     columns whose corrections are applied at once; a multiple of `choice_size`, or it cuts choices short
    rounded_group  columns that share a scale, where what is kept is rounded to a grid in the same pass, so that later
                   columns make up for that too. Its scale is that of the group as it is when it is reached, without
                   what is removed by then. A multiple or a divisor of `block_size`; None: nothing is rounded
    """
    columns = torch.where(inverse.dead, 0.0, weight.float()).T.contiguous()
    pivots = inverse.factor.diagonal().square()[:, None]
    removed = torch.zeros_like(columns, dtype=torch.bool)
    scales: list[Tensor] = []
    on_grid = torch.empty_like(columns) if rounded_group else columns

    def settled(i: int) -> Tensor:
        if i % choice_size == 0:
            chosen = slice(i, i + choice_size)
            removed[chosen] = choose(i, columns[chosen].square() / pivots[chosen])
        if rounded_group is None:
            return torch.where(removed[i], 0.0, columns[i])
        if i % rounded_group == 0:
            group = slice(i, i + rounded_group)
            scales.append(group_scales(torch.where(removed[group], 0.0, columns[group]).T))
        on_grid[i] = torch.where(removed[i], 0.0, rounded(columns[i], scales[-1]))
        return on_grid[i]

    loss = sweep(columns, inverse.factor, lambda start: min(start + block_size, len(columns)), settled)
    found = on_grid.masked_fill_(removed, 0.0).T.contiguous()
    return Swept(found, ~removed.T.contiguous(), loss, torch.stack(scales, dim=1) if scales else None)


def damped_factor(system: Tensor, damp: float, mean: float) -> Tensor:
    """Lower Cholesky factors of float64 [n, k, k], with `damp` times `mean` on the diagonal, and ten times as much, up
    to six times over, until all exist. Raises NumericsError if they never do."""
    for escalation in range(_ESCALATIONS + 1):
        damped = system.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damp * 10**escalation * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            factor: Tensor = lower
            return factor
    raise NumericsError(
        f"a Gram matrix of {system.shape[-1]} kept inputs is not positive definite even with damping "
        f"{damp * 10**_ESCALATIONS:g} of its mean diagonal. Use more calibration text."
    )


def _check(weight: Tensor, gram: Tensor, keep: Tensor, wanted: tuple[int, ...]) -> None:
    columns = weight.shape[1]
    if tuple(gram.shape) != (columns, columns) or tuple(keep.shape) != wanted or keep.dtype != torch.bool:
        raise ConfigError(
            f"a weight {list(weight.shape)} wants a Gram matrix [{columns}, {columns}] and a bool mask {list(wanted)}, "
            f"not {list(gram.shape)} and {keep.dtype} {list(keep.shape)}."
        )
