"""What a model would answer after some of its blocks only: its output head on what leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import TargetError
from trimtab.models.views import ModelView


class Exit(NamedTuple):
    """Where a model answers early: what leaves a block is put through the output head.

    block        1: the first; 0: the embeddings
    normalised   through the final norm before
    """

    block: int
    normalised: bool = False


class EarlyExits:
    """Answers of a model at exits before its last block, in the forward pass that gives its logits.

    The head multiplies all of them together with what it is given, so its weights are read once. What a family does to
    its logits after the head, such as Gemma's softcap, is not done to early ones.

    Raises TargetError for an unknown family.
    """

    def __init__(self, model: PreTrainedModel, exits: Sequence[Exit]) -> None:
        view = ModelView.of(model)
        self.exits = tuple(exits)
        self._norm = view.final_norm
        self._blocks = {place.block: view.blocks[place.block].module for place in self.exits}
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head: nn.Module = head
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[dict[Exit, Tensor]]:
        """Exit -> logits [R, T, V] of the forward pass in the body, in the model's dtype.

        Raises TargetError for a model whose head reads something else than its blocks write.
        """
        answers: dict[Exit, Tensor] = {}

        def entering(block: int) -> Any:
            # what enters a block is what leaves the one before
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._found[block] = args[0] if args else kwargs["hidden_states"]

            return note

        def before(module: nn.Module, args: tuple[Tensor]) -> Tensor:
            return torch.stack([*map(self._asked, self.exits), self._checked(args[0])])

        def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            *early, last = output.unbind(0)
            answers.update(zip(self.exits, early, strict=True))
            return last

        hooks = [
            *(m.register_forward_pre_hook(entering(i), with_kwargs=True) for i, m in self._blocks.items()),
            self._head.register_forward_pre_hook(before),
            self._head.register_forward_hook(after),
        ]
        try:
            yield answers
        finally:
            for hook in hooks:
                hook.remove()
            self._found.clear()

    def _asked(self, place: Exit) -> Tensor:
        hidden = self._found[place.block]
        return self._norm(hidden) if place.normalised else hidden

    def _checked(self, given: Tensor) -> Tensor:
        written = next(iter(self._found.values()))
        if written.shape != given.shape:
            raise TargetError(
                f"the output head reads {list(given.shape)}, but blocks write {list(written.shape)}; a model with a "
                "projection between them has no early exits."
            )
        return given
