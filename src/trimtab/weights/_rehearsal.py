"""A copy of a model in which weights can be exchanged for a moment, to see how far its predictions move."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.captured_call import first_output
from trimtab.models.views import ModelView

SEQUENCES, LENGTH = 32, 128
"""What is read of a calibration set, at most: many short pieces tell more than a few long ones."""


def split(calibration: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Sequences to gather statistics on, and other ones to rehearse on: at most a quarter, the last ones.

    A set of one sequence serves for both, and what is measured on it is then too good.
    """
    tokens, mask = calibration.tokens, calibration.mask
    count = min(SEQUENCES, max(1, len(tokens) // 4))
    kept = max(1, len(tokens) - count)
    rehearsed = CalibrationSet.from_tokens(tokens[-count:, :LENGTH], mask[-count:, :LENGTH], calibration.source)
    return CalibrationSet.from_tokens(tokens[:kept], mask[:kept], calibration.source), rehearsed


class Rehearsal:
    """A float32 copy of `model`, and what it predicts on `text`: [sequences, length, vocabulary] in memory.

    `divergence(weights)` is the mean over tokens of KL(as it is || with other weights), in nats. Differences of one
    matrix at 4 bits are far below what bfloat16 arithmetic resolves, hence the copy.
    """

    def __init__(self, model: PreTrainedModel, text: CalibrationSet) -> None:
        self._model = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
        self._model.train(False)
        self._model.requires_grad_(False)
        view = ModelView.of(self._model)
        self._linears = {linear.name: linear for linear in view.linears}
        self._blocks = [block.module for block in view.blocks]
        self._text = text
        self._from = 0
        self._hidden: Tensor | None = None
        self._log_probs = self._read()

    @torch.no_grad()
    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """With `weights` (name of a linear -> [out, in]) in place of its own. They must belong to blocks from the one
        that the rehearsal has come to."""
        before = {name: self._linears[name].weight.clone() for name in weights}
        try:
            for name, weight in weights.items():
                self._linears[name].set_weight(weight)
            changed = self._read()
        finally:
            for name, weight in before.items():
                self._linears[name].set_weight(weight)
        gap = (self._log_probs.exp() * (self._log_probs - changed)).sum(dim=-1)
        return max(0.0, float(gap[self._text.mask.to(gap.device)].double().mean()))

    @torch.no_grad()
    def go_to(self, index: int) -> None:
        """Run the blocks before `index` once more and never again: the next divergences begin there. 0: anew."""
        self._from, self._hidden = 0, None
        if index:
            with self._watched(index):
                self._read()
            self._from = index

    @contextlib.contextmanager
    def _watched(self, index: int) -> Iterator[None]:
        """Keep the input of block `index`."""

        def keep(module: object, arguments: tuple[Any, ...]) -> None:
            self._hidden = first_output(arguments)

        handle = self._blocks[index].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _read(self) -> Tensor:
        """Log-probabilities of all tokens, the blocks before `_from` left out."""
        tokens, mask = (t.to(self._model.device) for t in (self._text.tokens, self._text.mask))
        padding = None if bool(mask.all()) else mask.long()
        with self._started():
            logits = self._model(input_ids=tokens, attention_mask=padding, use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1)

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """Within: blocks before `_from` pass their input through, and that block reads what was kept for it."""
        if self._hidden is None or self._from == 0:
            yield
            return
        first, hidden = self._blocks[self._from], self._hidden
        own = first.forward
        try:
            for block in self._blocks[: self._from]:
                block.__dict__["forward"] = lambda state, *args, **kwargs: state
            first.__dict__["forward"] = lambda state, *args, **kwargs: own(hidden, *args, **kwargs)
            yield
        finally:
            for block in self._blocks[: self._from + 1]:
                block.__dict__.pop("forward", None)
