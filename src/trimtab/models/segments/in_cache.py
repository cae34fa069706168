"""Keys whose position is their index in the cache: where queries are there, and keys of a draft that branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.models.segments.rope import RopeSource, rotated, unrotated


def in_order(positions: Tensor, begins: Sequence[int], valid: list[list[int]] | None) -> Tensor:
    """Positions [R, T] as if the tokens followed each other from `begins` on, which those of a tree do not.

    A key that is unrotated by these, and rotated by its index in the cache later, stands where its place on its branch
    is. `straightened` gives the keys that are kept their index for good.
    """
    positions = positions.clone()
    for row, begin in enumerate(begins):
        columns = list(range(positions.shape[1])) if valid is None else valid[row]
        positions[row, columns] = torch.arange(begin, begin + len(columns), device=positions.device)
    return positions


def straightened(keys: Tensor, came: Sequence[int], begin: int, rope: RopeSource) -> Tensor:
    """Keys [H, n, d] of a branch, once stored as the tokens `came` of a draft, as if no other had been drafted.

    begin   position of the draft's first token
    """
    index = torch.tensor(came, device=keys.device)
    before, after = rope.angles(begin + index), rope.angles(begin + torch.arange(len(came), device=keys.device))
    return unrotated(rotated(keys, before), after)


def places(positions: Tensor, gone: Sequence[int]) -> Tensor:
    """Positions [R, T] in the text as those in the cache; of padding, whose own is below 0, it is 0.

    gone   for each row, how many positions come before what the cache holds, those of its sinks left out
    """
    return (positions - torch.tensor(gone, device=positions.device)[:, None]).clamp_(min=0)
