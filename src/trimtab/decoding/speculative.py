"""Draft a few tokens with a small model, check them all in one forward pass of the large one.

Paper: Yaniv Leviathan, Matan Kalman, Yossi Matias, "Fast Inference from Transformers via Speculative Decoding", ICML
2023, arXiv:2211.17192.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._rules.token import GreedyRule, TokenRule
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting

__all__ = ["Speculative"]

Rule = Literal["token"]


@dataclass(frozen=True, kw_only=True)
class Speculative(DecodingMethod):
    """Speculative sampling along a chain.

    draft              the model that drafts: one to load, or a copy of the model itself with smaller weights
                       (self:2bit, self:3bit, self:4bit, self:8bit)
    depth              tokens drafted per round
    draft_temperature  None: that of the target
    stop_below         draft no further once the draft's likeliest token has less probability; 0: never
    """

    draft: str = "self:4bit"
    depth: int = 5
    draft_temperature: float | None = None
    stop_below: float = 0.0

    def drafting(self, setting: DraftSetting) -> Drafting:
        sampling = setting.sampling
        temperature = sampling.temperature if self.draft_temperature is None else self.draft_temperature
        proposer = Chain(setting.new_reader(self.draft), setting.distribution(temperature), self.depth, self.stop_below)
        return Drafting(proposer, GreedyRule() if sampling.temperature == 0 else TokenRule())
