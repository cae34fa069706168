"""Full history for the heads that copy from far back, sinks and recent tokens for all others.

Paper: Wenhao Wu, Yizhong Wang, Guangxuan Xiao, Hao Peng, Yao Fu, "Retrieval Head Mechanistically Explains
Long-Context Factuality", ICLR 2025, arXiv:2404.15574.

A head's score is the share of a needle's tokens that it attends to most strongly in the very step that writes them,
averaged over trials of needles in a haystack that the model solves. A few heads have all the score; silencing them
destroys retrieval. So, as in DuoAttention (arXiv:2410.10819), the best `full_fraction` of the KV heads keep every
token and the others the first `sinks` and the last `recent` ones, at their positions in the text. Each head stores
its own tokens only, so the bytes saved are real. A KV head is as important as its best query head; equal scores are
told apart by their sum.

Scores are measured on the model's first use, 30 trials of up to 4,096 tokens, or read from a file; call
`trimtab.cache.detect_heads` to see, save and draw them. Keeping half of the heads is what DuoAttention advises for
models with grouped heads; where the scores show few retrieval heads a smaller share does, an eighth on `ref`.
Departures: DuoAttention learns its classes by gradient descent on gates; here they are read off retrieval scores. A
prompt attends to everything, and tokens are dropped afterwards; DuoAttention's streaming heads do not see them in the
prompt either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.cache.kivi import Kivi
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet

__all__ = ["RetrievalHeads"]

BLOCK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(CacheMethod):
    """Options of budgets by retrieval heads.

    full_fraction   share of the KV heads of the model that keep every token, the best by score
    sinks           first tokens that the others keep
    recent          last tokens that the others keep
    bits            of the heads that keep every token, as kivi stores them; 0: exact
    scores          file that `HeadScores.save` wrote, instead of measuring; must be of the same model
    """

    calibrated: ClassVar[bool] = True

    full_fraction: float = 0.5
    sinks: int = 16
    recent: int = 256
    bits: Literal[0, 2, 3, 4, 8] = 0
    scores: str | None = None

    def check(self) -> None:
        if not 0 <= self.full_fraction <= 1:
            raise ConfigError(f"retrieval_heads: full_fraction={self.full_fraction} must be in [0, 1].")
        if self.sinks < 0 or self.recent < 1:
            raise ConfigError(
                f"retrieval_heads: sinks={self.sinks} must be >= 0 and recent={self.recent} must be >= 1."
            )

    def fit_options(self) -> dict[str, object]:
        return {"scores": self.scores}

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """`scores` and `sums` [layers, KV heads]; from needles in the calibration prose, not from `calibration`."""
        from trimtab.cache._retrieval.detection import detect_heads
        from trimtab.cache._retrieval.scores import HeadScores

        found = detect_heads(model) if self.scores is None else HeadScores.load(self.scores, model)
        return {"scores": found.kv_scores, "sums": found.kv_sums}

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        from trimtab.cache._retrieval.budgets import full_heads

        full = full_heads(fitted["scores"], self.full_fraction, fitted["sums"])[layer.index]
        exact = TensorPlan(codec=KVCodec(bits=0), block=BLOCK_TOKENS)
        plans = []
        if keeping := tuple(head for head in layer.all_heads if full[head]):
            keys = values = exact
            if self.bits:
                kivi = Kivi(bits=self.bits).head_plans(layer, {})[0]
                keys, values = kivi.keys, kivi.values
            plans.append(HeadPlan(heads=keeping, keys=keys, values=values))
        if streaming := tuple(head for head in layer.all_heads if not full[head]):
            window = TensorPlan(codec=KVCodec(bits=0), window=self.recent, block=1)
            plans.append(HeadPlan(heads=streaming, keys=window, values=window, sinks=self.sinks, recent=self.recent))
        return tuple(plans)
