"""What new queries see of what a cache holds, from the masks that transformers makes.

Masks count columns, padding included; a cache holds no padding, so columns are moved together to its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_columns(mask: Tensor, length: int, rows: int) -> list[list[int]] | None:
    """For each row, which of the last `length` columns are tokens: a token sees itself. None if all are.

    mask   [R or 1, 1, length, n], bool or additive
    """
    own = mask[:, 0, :, -length:].diagonal(dim1=1, dim2=2)
    if own.dtype != torch.bool:
        own = own == 0
    return None if bool(own.all()) else [torch.nonzero(row)[:, 0].tolist() for row in own.expand(rows, -1)]


def tail_visible(
    mask: Tensor | None, length: int, span: int, columns: Sequence[list[int]] | None, rows: int, device: torch.device
) -> Tensor:
    """bool [R, length, span]: which of the last `span` tokens each of the last `length` queries sees.

    mask      as above; None: all tokens up to the query's own
    columns   for each row, which of the last `span` columns are tokens; None: all. They end up on the right, and what
              is left of them stands for older tokens, which are visible
    """
    if mask is None:
        shown = torch.ones((1, length, span), dtype=torch.bool, device=device).tril(span - length)
    else:
        shown = mask[:, 0, :, -span:]
        shown = shown if shown.dtype == torch.bool else shown == 0
    shown = shown.expand(rows, -1, -1)
    if columns is None or all(len(own) == span for own in columns):
        return shown
    moved = torch.ones_like(shown)
    for row, own in enumerate(columns):
        moved[row, :, span - len(own) :] = shown[row][:, own]
    return moved


def first_visible(held: Sequence[int], tail: Tensor | None, window: int, device: torch.device) -> Tensor:
    """int64 [R, length]: the first of the tokens held that is within a sliding window of each query.

    A query's place in the text follows the tokens before the tail and those of the tail that it sees, which holds for
    a path of a tree too.

    held   for each row, tokens held
    tail   as `tail_visible` returns it; None: one query, which sees all
    """
    if tail is None:
        return torch.tensor([[max(0, n - window)] for n in held], device=device)
    older = [n - tail.shape[2] for n in held]  # negative where padding fills the tail, which then counts as visible
    return (torch.tensor(older, device=device)[:, None] + tail.sum(dim=-1) - window).clamp_(min=0)
