"""Rotation of the channels of a block: a Hadamard transform over several heads, then an order of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_channels(y: Tensor, size: int) -> Tensor:
    """y [R, C, P] -> the same, channels transformed in blocks of `size`. Adds and halves only: exact under chunking."""
    width = 1
    while width < size:
        first, second = torch.unflatten(y, 1, (-1, 2, width)).unbind(2)
        y = torch.stack([first + second, first - second], dim=2).flatten(1, 3)
        width *= 2
    return y.mul(size**-0.5)
