"""Parameters without gradients, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter of `model` wants a gradient unless it is told to; afterwards each wants what it did."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, gradient in wanted:
            parameter.requires_grad_(gradient)
