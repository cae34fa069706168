"""Models as the tests of this room need them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.views import ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid


def compress_all(
    model: PreTrainedModel, bits: int = 4, symmetric: bool = False, group_size: int = 16
) -> PreTrainedModel:
    """Every linear of every block rounded to the nearest code of a grid: what the methods do, without their choices."""
    fmt = GridFormat(bits=bits, symmetric=symmetric, group_size=group_size)
    for linear in ModelView.of(model).linears:
        tensor = CompressedTensor((GroupGrid.quantize(linear.weight.float(), fmt),))
        linear.replace(CompressedLinear(tensor, linear.module.bias))
    return model


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens).logits
    assert isinstance(found, torch.Tensor)
    return found
