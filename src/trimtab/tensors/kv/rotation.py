"""Rotation of the channels of a block: a Hadamard transform over several heads, then an order of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_channels(y: Tensor, size: int) -> Tensor:
    """y [R, C, P] -> the same, channels transformed in blocks of `size`, the normalised Walsh-Hadamard matrix.

    What the reference's `hadamard_transform` computes, over channels that are not the last dimension. Every sum has
    two terms in a fixed order, so a token's result does not depend on the tokens beside it.
    """
    width = 1
    while width < size:
        first, second = torch.unflatten(y, 1, (-1, 2, width)).unbind(2)
        y = torch.stack([first + second, first - second], dim=2).flatten(1, 3)
        width *= 2
    return y.mul(size**-0.5)


def channel_order(sums: Tensor, hadamard: int) -> Tensor:
    """Order of the rotated channels by their signed sum, ascending; equal ones keep their order.

    sums       [H, d]: keys before rotary embedding, summed over all tokens of the calibration text
    hadamard   channels in a Hadamard block, as in the codec: one block spans several heads
    Returns int16 [H d], the codec's `order`: channels of similar level become neighbours and share a group.

    The transform is linear, so the sums of rotated keys are the rotated sums. Source: RotateKV (arXiv:2501.16383),
    whose code sums signed values after the rotation; sorting magnitudes, or before it, groups unlike channels.
    """
    rotated = hadamard_channels(sums.double().reshape(1, -1, 1), hadamard).flatten()
    return torch.argsort(rotated, stable=True).to(torch.int16)
