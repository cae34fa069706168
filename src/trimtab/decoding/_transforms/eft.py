"""The difference that tuning made to a small model, added to a large one."""

from __future__ import annotations

from torch import Tensor

from trimtab.decoding._distribution import Prefixes
from trimtab.decoding._reader import Rows
from trimtab.models.early_exits import Exit

TUNED, UNTUNED = "tuned", "untuned"


class EftTransform:
    """logits + beta (tuned - untuned), where the companions `tuned` and `untuned` have read the same tokens."""

    exits: tuple[Exit, ...] = ()

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        return logits + self.beta * (rows.others[TUNED] - rows.others[UNTUNED])
