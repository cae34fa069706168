"""Whether drafting pays: decided from measured times, so that it never costs more than a set share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

ALLOWED_LOSS = 0.03
"""Share of the time so far that drafting may have lost to plain decoding."""
_PLAIN_FIRST = 2
_PLAIN_KEPT = 32


@dataclass
class Controller:
    """Keeps account of what drafting has won or lost against plain decoding, in seconds.

    A round with a draft is worth the plain rounds that it saves. As long as the account is not overdrawn by more than
    `allowed_loss` of the whole time, drafts go on; then plain rounds follow until there is room to try again. So a
    draft that never helps costs at most this share, plus one round. What a plain round takes is measured, in the
    first rounds and whenever there is one.

    fixed   draft always (True) or never (False), whatever it costs; None: decide
    """

    allowed_loss: float = ALLOWED_LOSS
    fixed: bool | None = None
    _plain: list[float] = field(default_factory=list)
    _elapsed: float = 0.0
    _balance: float = 0.0
    _last_cost: float = 0.0

    def wants_draft(self) -> bool:
        """Whether the next round should have a draft."""
        if self.fixed is not None:
            return self.fixed
        if len(self._plain) < _PLAIN_FIRST:
            return False
        return self._balance - self._last_cost >= -self.allowed_loss * (self._elapsed + self._last_cost)

    def note(self, seconds: float, tokens: float, *, drafted: bool) -> None:
        """A round took so long and committed so many tokens per text."""
        self._elapsed += seconds
        if not drafted:
            self._plain = [*self._plain[1 - _PLAIN_KEPT :], seconds]
            return
        saved = tokens * self.plain_seconds - seconds
        self._balance += saved
        self._last_cost = max(0.0, -saved)

    @property
    def plain_seconds(self) -> float:
        """Median of the plain rounds measured last; 0 before there is one."""
        return statistics.median(self._plain) if self._plain else 0.0
