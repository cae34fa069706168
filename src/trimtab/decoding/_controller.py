"""Whether drafting pays: decided from measured times, so that it never costs more than a set share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

ALLOWED_LOSS = 0.01
"""Share of the time that drafts may lose to plain decoding in the long run ..."""
CREDIT_ROUNDS = 3.0
"""... beside what so many plain rounds take, once."""
_PLAIN_FIRST = 2
_PLAIN_KEPT = 16
_PLAIN_EVERY = 24
"""Rounds with drafts after which a plain one is measured again, fewer at first: texts grow, machines change."""
_WEIGHT = 1 / 32
_TRUST = 0.5
"""Savings in plain rounds beyond which the average does not grow: a text may turn from easy to hard."""


@dataclass
class Controller:
    """Keeps account of what drafting has won or lost against plain decoding, in seconds.

    A round with a draft is worth the plain rounds that it saves; what it loses is a debt, which time pays back at the
    rate of `allowed_loss`, and savings do. Drafts go on while they are expected to save, by a moving average, or while
    the debt that one more would leave is at most what `credit_rounds` plain rounds take; and once there is no debt
    left, one is tried whatever it cost before. So drafts that never help cost the credit, this share of the time and
    one round. What a plain round takes is measured, in the first rounds and now and then, always in the second one of
    several, since the draft has had the processor's caches before the first.

    fixed   draft always (True) or never (False), whatever it costs; None: decide
    """

    allowed_loss: float = ALLOWED_LOSS
    credit_rounds: float = CREDIT_ROUNDS
    fixed: bool | None = None
    _plain: list[float] = field(default_factory=list)
    _drafted: int = 0
    _warm: bool = False
    _debt: float = 0.0
    _expected: float = 0.0

    def wants_draft(self) -> bool:
        """Whether the next round should have a draft."""
        if self.fixed is not None:
            return self.fixed
        if len(self._plain) < _PLAIN_FIRST or self._drafted >= min(2 * len(self._plain), _PLAIN_EVERY):
            return False
        after = self._debt - self._expected
        return self._expected > 0 or self._debt == 0 or after <= self.credit_rounds * self.plain_seconds

    def note(self, seconds: float, tokens: float, *, drafted: bool) -> None:
        """A round took so long and committed so many tokens per text."""
        saved = 0.0
        if drafted:
            saved = tokens * self.plain_seconds - seconds
            expected = self._expected + _WEIGHT * (saved - self._expected)
            self._expected = min(expected, _TRUST * self.plain_seconds)
            self._drafted += 1
        elif self._warm:
            self._plain = [*self._plain[1 - _PLAIN_KEPT :], seconds]
            self._drafted = 0
        self._warm = not drafted
        self._debt = max(0.0, self._debt - saved - self.allowed_loss * seconds)

    @property
    def plain_seconds(self) -> float:
        """Median of the plain rounds measured last; 0 before there is one."""
        return statistics.median(self._plain) if self._plain else 0.0
