"""The optimiser: Muon for the matrices inside the blocks, AdamW for embeddings and norm gains."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


class Optimizer:
    """Muon (Jordan et al. 2024) and AdamW side by side under one learning rate.

    Muon's update is scaled to the root mean square of AdamW's, so that one rate suits both. With
    ``muon=False`` AdamW does everything.
    """

    def __init__(self, model: LlamaForCausalLM, muon: bool) -> None:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inside = parameter.ndim == 2 and "embed" not in name
            (matrices if inside and muon else others).append(parameter)
        adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.parts: list[torch.optim.Optimizer] = [adam]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float) -> None:
        """One update with this learning rate, then forget the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
