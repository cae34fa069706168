"""Draft several independent sequences, verify them as one trie, accept by optimal transport.

Paper: Ziteng Sun, Ananda Theertha Suresh, Jae Hun Ro, Ahmad Beirami, Himanshu Jain, Felix Yu, "SpecTr: Fast Speculative
Decoding via Optimal Transport", NeurIPS 2023, arXiv:2310.15141.

`k` sequences of `depth` tokens are drawn independently from the draft and merged into a trie, which the target reads in
one forward pass. At each node the tokens of the sequences that came that far are independent draws from the draft p;
they are tried one after the other and accepted with probability min(1, q / (rho p)), q being the target. rho is the
smallest factor for which what is left of q can be drawn from; for one sequence it is 1, which is speculative sampling.
A text follows the target's distribution; the share of accepted tokens is at least 1 - 1/e of what any way to use k
independent drafts can reach.

Departures: the sequences are read as a trie, so tokens that they share are read once; candidates of a node are tried in
random order, because the trie forgets the order of the draws. At temperature 0, of which the paper does not speak,
sequences are drawn at 0.25, so that they are likely ones and not all the same.

Cost: up to k depth tokens per forward pass of the target, and depth forward passes of the draft. It does not pay where
reading k depth tokens takes the target much longer than reading one: on a processor, or in large batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import ConfigError
from trimtab.decoding._proposers.sequences import Sequences
from trimtab.decoding._rules.k_seq import KSeqRule
from trimtab.decoding._rules.token import GreedyRule
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting

__all__ = ["Spectr"]

_GREEDY = 0.25  # of .05 to 1 the best on calibration text, 4 and 8 sequences of 4 tokens


@dataclass(frozen=True, kw_only=True)
class Spectr(DecodingMethod):
    """SpecTr with the k-SEQ rule.

    draft              the model that drafts: one to load, or a copy of the model itself with smaller weights
                       (self:2bit, self:3bit, self:4bit, self:8bit)
    k                  sequences
    depth              tokens of each
    draft_temperature  None: that of the target, or 0.25 where that is 0
    """

    draft: str = "self:4bit"
    k: int = 8
    depth: int = 4
    draft_temperature: float | None = None

    def check(self) -> None:
        self.check_positive("k", "depth")
        if self.draft_temperature is not None and self.draft_temperature <= 0:
            raise ConfigError(f"Spectr: draft_temperature={self.draft_temperature}; at 0 all sequences are the same.")

    def drafting(self, setting: DraftSetting) -> Drafting:
        setting.check_depth(self.depth)
        proposer = Sequences(
            setting.new_reader(self.draft), setting.drawn(self.draft_temperature, greedy=_GREEDY), self.depth, self.k
        )
        return Drafting(proposer, GreedyRule() if setting.sampling.temperature == 0 else KSeqRule())
