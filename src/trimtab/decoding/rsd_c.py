"""Draft a tree of constant branching whose siblings are drawn without replacement; test them one after the other.

Paper: Wonseok Jeon, Mukul Gagrani, Raghavv Goel, Junyoung Park, Mingu Lee, Christopher Lott, "Recursive Speculative
Decoding: Accelerating LLM Inference via Sampling Without Replacement", 2024, arXiv:2402.14160.

Independent candidates repeat each other. Here the children of a node are the b tokens with the largest
log p + Gumbel noise, which is b draws without replacement from the draft p. The k-th one is a draw from p without the
k - 1 before it, p_k; it is accepted with probability min(1, q_k / p_k), and else q_(k+1) is (q_k - p_k)+, normalised,
with q_1 the target. A text follows the target's distribution.

Departures: none. At temperature 0, of which the paper does not speak, the tree is drawn at 0.1: nearly always the
likeliest tokens.

Cost: b_0 + b_0 b_1 + ... tokens per forward pass of the target, one forward pass of the draft per level. Choose it over
`rsd_s` where all texts of a batch should have trees of one size; wide trees do not pay where a forward pass is slow in
the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import ConfigError
from trimtab.decoding._proposers.gumbel import ConstantBranching
from trimtab.decoding._rules.recursive import RecursiveRule
from trimtab.decoding._rules.token import GreedyRule
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting

__all__ = ["RsdC"]


@dataclass(frozen=True, kw_only=True)
class RsdC(DecodingMethod):
    """Recursive speculative decoding with constant branching.

    draft              the model that drafts: one to load, or a copy of the model itself with smaller weights
                       (self:2bit, self:3bit, self:4bit, self:8bit)
    branching          children of a node, level by level; as many levels as there are numbers
    draft_temperature  None: that of the target, or 0.1 where that is 0
    """

    draft: str = "self:4bit"
    branching: tuple[int, ...] = (2, 1, 1, 1)
    draft_temperature: float | None = None

    def check(self) -> None:
        self.check_positive("branching")
        if self.draft_temperature is not None and self.draft_temperature <= 0:
            raise ConfigError(f"RsdC: draft_temperature={self.draft_temperature}; at 0 there is one token to draw.")

    def drafting(self, setting: DraftSetting) -> Drafting:
        setting.check_depth(len(self.branching))
        proposer = ConstantBranching(
            setting.new_reader(self.draft), setting.drawn(self.draft_temperature, greedy=0.1), self.branching
        )
        return Drafting(proposer, GreedyRule() if setting.sampling.temperature == 0 else RecursiveRule())
