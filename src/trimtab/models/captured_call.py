"""A call of a module, kept so that it can be made again after the module's weights have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class CapturedCall:
    """One call of `module` during calibration.

    args, kwargs    as the model gave them: hidden states first, then masks, rotary tables, positions
    output          what came out then, [sequences, length, width] (the first entry if the module returns a tuple)
    mask            bool [sequences, length], False at padding
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    mask: Tensor

    @property
    def hidden(self) -> Tensor:
        """The module's input [sequences, length, width]."""
        found = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(found, Tensor)
        return found

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """The output with the module's present weights, on `hidden` in place of the input if it is given.

        Gradients flow unless the caller has switched them off.
        """
        args, kwargs = self.args, dict(self.kwargs)
        if hidden is not None:
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs["hidden_states"] = hidden
        return first_output(self.module(*args, **kwargs))


def first_output(output: Any) -> Tensor:
    """A module's hidden states, whether it returns them alone or first in a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
