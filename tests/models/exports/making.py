"""Compressed models as the tests of exports need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.models import CompressedLinear, ModelView, random_model
from trimtab.models.views import LinearView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.low_rank import LowRank, svd

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Widths that fill 32-bit words at every number of bits, in groups of 32."""


def llama(seed: int = 0, **options: Any) -> PreTrainedModel:
    return random_model("llama", seed, **{**SIZES, **options})


def replace(linear: LinearView, tensor: CompressedTensor) -> None:
    linear.replace(CompressedLinear(tensor, linear.module.bias))


def grids(model: PreTrainedModel, **fmt: Any) -> PreTrainedModel:
    """Every linear of every block as one grid of this format."""
    return each(model, lambda linear: fmt)


def each(model: PreTrainedModel, choose: Callable[[LinearView], dict[str, Any] | None]) -> PreTrainedModel:
    """Every linear as a grid of the format that `choose` gives for it; None leaves it dense."""
    for linear in ModelView.of(model).linears:
        if (fmt := choose(linear)) is not None:
            grid = GroupGrid.quantize(linear.weight.float(), GridFormat(**fmt))
            replace(linear, CompressedTensor((grid,)))
    return model


def with_low_rank(model: PreTrainedModel, **fmt: Any) -> PreTrainedModel:
    """Grids with a low-rank part of rank 4, 5 or 6 of the error; the second linear stays dense, the third a grid."""
    for index, linear in enumerate(ModelView.of(model).linears):
        if index == 1:
            continue
        weight = linear.weight.float()
        grid = GroupGrid.quantize(weight, GridFormat(**{"bits": 2, "group_size": 16, **fmt}))
        low_rank: tuple[LowRank, ...] = () if index == 2 else (svd(weight - grid.dequantize(), 4 + index % 3),)
        replace(linear, CompressedTensor((grid, *low_rank)))
    return model


def compressed(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def same_layers(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """The same layers of the same form, with every buffer equal bit for bit."""
    left, right = compressed(a), compressed(b)
    return left.keys() == right.keys() and all(
        left[name].spec == right[name].spec
        and all(torch.equal(value, right[name].stored()[key]) for key, value in left[name].stored().items())
        for name in left
    )
