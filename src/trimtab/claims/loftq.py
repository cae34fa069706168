"""Claims on LoftQ: as a correction, and as the start of fine-tuning."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.claims._reference import MEASURED, SEEDS, SETTING, measured, predictions
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import ModelView
from trimtab.tensors.low_rank import LowRank
from trimtab.weights import Loftq, Nf, Rtn

__all__ = ["CLAIMS"]

BITS: tuple[Literal[4, 3, 2], ...] = (4, 3, 2)
STEPS, BATCH, LENGTH = 30, 8, 128
LEARNING_RATE = 1e-3


def beats_its_quantizer() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        corrected, alone = measured(Loftq(bits=bits)), measured(Nf(bits=bits))
        high = corrected.divergence.kl_difference(alone.divergence).high
        found |= {f"kl_nats_per_token_{bits}_bits": corrected.kl, f"kl_difference_high_{bits}_bits": high}
        found[f"bits_per_weight_{bits}_bits"] = corrected.bits_per_weight
        baseline |= {
            f"nf_kl_nats_per_token_{bits}_bits": alone.kl,
            f"nf_bits_per_weight_{bits}_bits": alone.bits_per_weight,
        }
        holds &= high < 0
    return Outcome(found, baseline, holds)


def more_iterations_help() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for bits in BITS:
        five, one = measured(Loftq(bits=bits)), measured(Loftq(bits=bits, iterations=1))
        high = five.divergence.kl_difference(one.divergence).high
        found |= {f"kl_nats_per_token_{bits}_bits": five.kl, f"kl_difference_high_{bits}_bits": high}
        baseline[f"one_iteration_kl_nats_per_token_{bits}_bits"] = one.kl
        holds &= high < 0
    return Outcome(found, baseline, holds)


def better_use_of_the_same_bytes() -> Outcome:
    """The nf of most bits, in the smallest groups, that takes no more bytes than nf at 2 bits with its correction."""
    corrected = measured(Loftq(bits=2))
    alone = measured(Nf(bits=3, group_size=32))
    return Outcome(
        {"kl_nats_per_token": corrected.kl, "bits_per_weight": corrected.bits_per_weight},
        {"nf_3_bits_kl_nats_per_token": alone.kl, "nf_3_bits_bits_per_weight": alone.bits_per_weight},
        holds=corrected.kl < alone.kl,
    )


def weighing_by_inputs_helps() -> Outcome:
    plain, alone = measured(Loftq(bits=2, quantizer="grid", rank=4, iterations=1)), measured(Rtn(bits=2, group_size=32))
    found: dict[str, float] = {}
    holds = True
    for seed in SEEDS:
        weighted = measured(Loftq(bits=2, quantizer="grid", rank=4, iterations=1, metric="gram"), seed=seed)
        high = weighted.divergence.kl_difference(plain.divergence).high
        found |= {f"kl_nats_per_token_seed_{seed}": weighted.kl, f"kl_difference_high_seed_{seed}": high}
        holds &= high < 0
    found["bits_per_weight"] = plain.bits_per_weight
    baseline = {
        "frobenius_kl_nats_per_token": plain.kl,
        "rtn_groups_of_32_kl_nats_per_token": alone.kl,
        "rtn_groups_of_32_bits_per_weight": alone.bits_per_weight,
    }
    return Outcome(found, baseline, holds)


def starts_fine_tuning_lower() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for seed in SEEDS:
        found[f"loss_seed_{seed}"] = fine_tuned_loss("loftq", seed)
        baseline[f"zero_start_loss_seed_{seed}"] = fine_tuned_loss("zero", seed)
    found["loss_before"] = fine_tuned_loss("loftq", 0, steps=0)
    baseline |= {"zero_start_loss_before": fine_tuned_loss("zero", 0, steps=0), "original_loss": _original_loss()}
    lower = all(found[f"loss_seed_{seed}"] < baseline[f"zero_start_loss_seed_{seed}"] for seed in SEEDS)
    return Outcome(found, baseline, holds=lower)


class Adapted(nn.Module):
    """A frozen quantized weight and trainable factors: y = x (Q + L R)^T."""

    def __init__(self, quantized: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("quantized", quantized)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("quantized").T + (x @ self.right.T) @ self.left.T


def fine_tuned_loss(start: Literal["loftq", "zero"], seed: int, steps: int = STEPS, rank: int = 16) -> float:
    """Loss on held-out prose, nats per token, of ref-mini at 2 bits after training its adapters on other prose.

    "loftq" starts from Loftq's factors over its Q, "zero" as QLoRA: over nf, the left factor zero and the right random.
    `seed` draws the text, its order and the random factor.
    """
    model = load("ref-mini", dtype=torch.float32)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in ModelView.of(model).linears:
        if start == "loftq":
            quantized, factors = Loftq(bits=2, rank=rank).compress(linear, None)[0].parts
            assert isinstance(factors, LowRank)
            left, right = factors.left.float(), factors.right.float()
        else:
            (quantized,) = Nf(bits=2).compress(linear, None)[0].parts
            bound = 1 / math.sqrt(linear.in_features)
            right = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
            left = torch.zeros(linear.out_features, rank)
        linear.replace(Adapted(quantized.dequantize(), left, right))
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=256, length=LENGTH, seed=seed).tokens
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for _ in range(steps):
        tokens = text[torch.randint(len(text), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        _loss(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return float(_loss(model, predictions().tokens))


@functools.cache
def _original_loss() -> float:
    with torch.no_grad():
        return float(_loss(load("ref-mini", dtype=torch.float32), predictions().tokens))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


_PAPER = method_info("loftq").paper

CLAIMS = (
    Claim(
        "loftq",
        _PAPER,
        "Quantized weight and low-rank correction chosen together are closer to the original than the quantized weight "
        "alone.",
        f"ref at 4, 3 and 2 bits with nf and rank 16, {MEASURED}. Holds if the paired 95 % interval of the difference "
        "in KL to nf alone lies below zero at each. The correction takes 1.6 bits per weight more.",
        beats_its_quantizer,
    ),
    Claim(
        "loftq",
        _PAPER,
        "Five turns are better than one, which is what peft does by default.",
        f"ref at 4, 3 and 2 bits with nf and rank 16, {MEASURED}. Holds if the paired 95 % interval of the difference "
        "in KL lies below zero at each. The bytes are the same.",
        more_iterations_help,
    ),
    Claim(
        "loftq",
        _PAPER,
        "At equal bytes the correction is worth more than more bits: not the paper's claim, but what a user of it as "
        "compression would hope.",
        f"ref at 2 bits with rank 16 against nf at 3 bits in groups of 32, which takes fewer bytes, {MEASURED}. Holds "
        "if KL is lower.",
        better_use_of_the_same_bytes,
    ),
    Claim(
        "loftq",
        "Deng et al., CLoQ, arXiv:2501.18475",
        "A correction that is optimal for the layer's output beats one that is optimal for its weight.",
        f"ref at 2 bits, integer grid, rank 4, one turn, {SETTING}. Holds if the paired 95 % interval of the "
        "difference in KL lies below zero for each of three seeds of the calibration text. Beside it, rtn in groups of "
        "32, which takes nearly the same bytes.",
        weighing_by_inputs_helps,
    ),
    Claim(
        "loftq",
        _PAPER,
        "At 2 bits, fine-tuning from LoftQ's factors reaches a lower loss than from zero factors (QLoRA).",
        f"ref-mini at 2 bits with rank 16, factors trained for {STEPS} steps of {BATCH} x {LENGTH} tokens of prose at "
        f"learning rate {LEARNING_RATE:g}, loss on held-out prose. Holds if it is lower for each of three seeds.",
        starts_fine_tuning_lower,
    ),
)
