"""Whether a way of decoding follows the distribution that it should: tiny models whose every text can be enumerated."""

from __future__ import annotations

from trimtab.core.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {"TableModel": "table", "TableReader": "table", "PairTest": "gate", "check_pairs": "gate", "exact_pairs": "gate"},
)
