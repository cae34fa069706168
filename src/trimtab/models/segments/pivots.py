"""Tokens that massive activations mark: the largest entries of a block's input (RotateKV's attention sinks)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.models.views import ModelView

_WATCHED = "_trimtab_watches_inputs"


def pivot_tokens(hidden: Tensor, count: int) -> Tensor:
    """Of hidden states [T, c], the tokens that hold any of the `count` largest |entries|, ascending."""
    top = hidden.abs().flatten().topk(min(count, hidden.numel())).indices // hidden.shape[-1]
    found: Tensor = torch.unique(top)
    return found


def watch_inputs(model: PreTrainedModel) -> None:
    """Let caches that keep pivots see what enters each block. Once per model; costs nothing without such a cache."""
    if getattr(model, _WATCHED, False):
        return
    setattr(model, _WATCHED, True)
    for block in ModelView.of(model).blocks:
        block.module.register_forward_pre_hook(_Watcher(block.index), with_kwargs=True)


class _Watcher:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs.get("layer_past")
        note = getattr(cache, "note_inputs", None)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if note is not None and isinstance(hidden, Tensor) and hidden.shape[1] > 1:
            note(self.index, hidden)
