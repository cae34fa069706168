"""Draft a few tokens with a small model, check them all in one forward pass of the large one.

Paper: Yaniv Leviathan, Matan Kalman, Yossi Matias, "Fast Inference from Transformers via Speculative Decoding", ICML
2023, arXiv:2211.17192.

A chain of `depth` tokens y_i is drawn from the draft's distributions p_i; one forward pass of the target gives q_i at
every place. Token by token, y_i is accepted with probability min(1, q_i(y_i) / p_i(y_i)); the first that is not is
replaced by a draw from (q_i - p_i)+, and after a chain accepted whole comes a draw from the target. The text follows
the target's distribution, whatever the draft. With a chance beta of accepting a token, a round writes
(1 - beta^(depth + 1)) / (1 - beta) tokens.

Of other authors: chains accepted as a block (Sun et al., arXiv:2403.10444), never fewer tokens on average; typical
acceptance (Cai et al., arXiv:2401.10774), which takes what the target finds plausible and changes the distribution;
drafts from the text itself (prompt look-up), which cost nothing and help where a text repeats what it has.

Departures: none. It does not pay where the draft is slow or disagrees: the decoder then leaves drafts out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.core.errors import ConfigError
from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._proposers.ngram import NgramLookup
from trimtab.decoding._rules.base import AcceptanceRule
from trimtab.decoding._rules.block import BlockRule
from trimtab.decoding._rules.token import GreedyRule, SampleRule, TokenRule
from trimtab.decoding._rules.typical import TypicalRule
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting

__all__ = ["Speculative"]

Rule = Literal["token", "block", "typical"]
NGRAM = "ngram"


@dataclass(frozen=True, kw_only=True)
class Speculative(DecodingMethod):
    """Speculative sampling along a chain.

    draft              the model that drafts: one to load, or a copy of the model itself with smaller weights
                       (self:2bit, self:3bit, self:4bit, self:8bit), or `ngram`: what followed the last tokens of the
                       text when they came before
    depth              tokens drafted per round
    draft_temperature  None: that of the target
    stop_below         draft no further once the draft's likeliest token has less probability; 0: never
    rule               of acceptance: token by token, by block, or typical, which is lossy unless the temperature is 0
    ngram              tokens at the end of the text that `ngram` looks for, at most
    epsilon            typical: accept what has a probability above this ...
    delta              ... or above exp(-entropy) times this
    """

    draft: str = "self:4bit"
    depth: int = 5
    draft_temperature: float | None = None
    stop_below: float = 0.0
    rule: Rule = "token"
    ngram: int = 3
    epsilon: float = 0.09
    delta: float = 0.3

    def check(self) -> None:
        self.check_positive("depth", "ngram")
        if self.draft_temperature is not None and self.draft_temperature < 0:
            raise ConfigError(f"Speculative: draft_temperature={self.draft_temperature}; it must be at least 0.")
        for name in ("stop_below", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Speculative: {name}={getattr(self, name)} is no probability.")
        if self.delta < 0:
            raise ConfigError(f"Speculative: delta={self.delta}; it must be at least 0.")
        if self.draft == NGRAM and (self.rule == "block" or self.draft_temperature is not None or self.stop_below):
            raise ConfigError(
                "Speculative: draft='ngram' names tokens and draws none, so rule='block', draft_temperature and "
                "stop_below do not apply to it."
            )

    @property
    def lossless(self) -> bool:
        return self.rule != "typical"

    def drafting(self, setting: DraftSetting) -> Drafting:
        setting.check_depth(self.depth)
        return Drafting(self._proposer(setting), self._rule(setting))

    def _proposer(self, setting: DraftSetting) -> Proposer:
        if self.draft == NGRAM:
            return NgramLookup(self.depth, self.ngram)
        temperature = setting.sampling.temperature if self.draft_temperature is None else self.draft_temperature
        return Chain(setting.new_reader(self.draft), setting.distribution(temperature), self.depth, self.stop_below)

    def _rule(self, setting: DraftSetting) -> AcceptanceRule:
        if setting.sampling.temperature == 0:
            return GreedyRule()
        if self.rule == "typical":
            return TypicalRule(self.epsilon, self.delta)
        if self.draft == NGRAM:
            return SampleRule()
        return BlockRule() if self.rule == "block" else TokenRule()
