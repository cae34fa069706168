"""The same model at a higher price: MLPs with neurons that add nothing.

Drafting pays by how often the target accepts and by what a forward pass of it costs. The reference models are a real
pair for the first and far too small for the second. A neuron whose row of the down projection is zero changes no
output, whatever it computes, so a model widened by such neurons writes the same text at the cost of a larger one.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.models.views import ModelView


@torch.no_grad()
def widen(model: PreTrainedModel, weights: int, *, seed: int = 0) -> int:
    """Add about so many weights to the MLPs of a Llama-like model, in place; returns how many it has now.

    The new rows of gate and up are random, the new columns of down zero. The configuration is changed with them, so
    that the model can be saved.
    """
    blocks = ModelView.of(model).blocks
    hidden = int(model.config.hidden_size)
    new = round(weights / (3 * hidden * len(blocks)) / 64) * 64
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for linear in block.mlp.linears:
            old = linear.weight.detach()
            if linear.role == "down":
                linear.replace(_linear(torch.cat([old, old.new_zeros((hidden, new))], dim=1)))
            else:
                rows = torch.randn((new, hidden), generator=generator) / hidden**0.5
                linear.replace(_linear(torch.cat([old, rows.to(old.dtype)])))
    model.config.intermediate_size += new
    return sum(parameter.numel() for parameter in model.parameters())


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    made.weight.copy_(weight)
    return made
