"""Add to a large model what tuning did to a small one, token by token.

Paper: Eric Mitchell, Rafael Rafailov, Archit Sharma, Chelsea Finn, Christopher D. Manning, "An Emulator for Fine-Tuning
Large Language Models using Small Language Models", ICLR 2024, arXiv:2310.12962.

The logits are z_base + beta (z_tuned - z_untuned): the large model as it would be if it had been tuned likewise. All
three models read the same tokens, so they need the same tokenizer; `weak_to_strong` does without. It goes with any way
of drafting, which then decodes this distribution exactly.

Cost: a forward pass of both small models with each of the large one, and their caches.

When it fails: errors of the small pair add up at each token, and a large beta leaves what the large model would say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from trimtab.decoding._distribution import LogitsTransform
from trimtab.decoding._transforms.eft import TUNED, UNTUNED, EftTransform
from trimtab.decoding.base import DecodingMethod

__all__ = ["Eft"]


@dataclass(frozen=True, kw_only=True)
class Eft(DecodingMethod):
    """Emulated fine-tuning.

    tuned    the small model after tuning, by any name that loads
    untuned  the small model before
    beta     how much of the difference is added
    """

    tuned: str
    untuned: str
    beta: float = 1.0

    def transforms(self, model: PreTrainedModel) -> tuple[LogitsTransform, ...]:
        return (EftTransform(self.beta),)

    def companions(self, named: Callable[[str], PreTrainedModel]) -> dict[str, PreTrainedModel]:
        return {TUNED: named(self.tuned), UNTUNED: named(self.untuned)}
