"""Draft sequences without replacement by stochastic beam search; test siblings one after the other.

Paper: Wonseok Jeon, Mukul Gagrani, Raghavv Goel, Junyoung Park, Mingu Lee, Christopher Lott, "Recursive Speculative
Decoding: Accelerating LLM Inference via Sampling Without Replacement", 2024, arXiv:2402.14160.

As `rsd_c`, but each level keeps the `width` sequences with the largest perturbed log-probabilities, noise of children
being drawn so that their largest is their parent's (Kool et al., arXiv:1903.06059): draws without replacement among
whole sequences, so that unlikely branches end early and likely ones get the room. Acceptance is that of `rsd_c`; that a
node lost some children says nothing about those it kept, so a text follows the target's distribution.

Departures: none. Branches that ended early stay in the tree as leaves. At temperature 0, of which the paper does not
speak, the tree is drawn at 0.1: nearly always a beam of the likeliest sequences.

Cost: up to width depth tokens per forward pass of the target, depth forward passes of the draft. Wide trees do not pay
where a forward pass is slow in the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import ConfigError
from trimtab.decoding._proposers.gumbel import StochasticBeam
from trimtab.decoding._rules.recursive import RecursiveRule
from trimtab.decoding._rules.token import GreedyRule
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting

__all__ = ["RsdS"]


@dataclass(frozen=True, kw_only=True)
class RsdS(DecodingMethod):
    """Recursive speculative decoding with stochastic beam search.

    draft              the model that drafts: one to load, or a copy of the model itself with smaller weights
                       (self:2bit, self:3bit, self:4bit, self:8bit)
    width              sequences of a level
    depth              levels
    draft_temperature  None: that of the target, or 0.1 where that is 0
    """

    draft: str = "self:4bit"
    width: int = 4
    depth: int = 4
    draft_temperature: float | None = None

    def check(self) -> None:
        self.check_positive("width", "depth")
        if self.draft_temperature is not None and self.draft_temperature <= 0:
            raise ConfigError(f"RsdS: draft_temperature={self.draft_temperature}; at 0 there is one token to draw.")

    def drafting(self, setting: DraftSetting) -> Drafting:
        setting.check_depth(self.depth)
        proposer = StochasticBeam(
            setting.new_reader(self.draft), setting.drawn(self.draft_temperature, greedy=0.1), self.depth, self.width
        )
        return Drafting(proposer, GreedyRule() if setting.sampling.temperature == 0 else RecursiveRule())
