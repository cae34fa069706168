"""Single linear layers: trimtab's representations and other libraries' in one run on the same weights.

systems     which systems there are; their names are those of `weight_decode`
_run        lets `beside` give each system a process of its own, and gathers an entry for each product
measure     what is measured, the same for all
makers      how a system makes a layer of a dense weight
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation.linear_speed._run import run as run
    from trimtab.evaluation.linear_speed.measure import Setting as Setting
    from trimtab.evaluation.linear_speed.systems import choose as choose

__getattr__, __dir__ = lazy_exports(__name__, {"Setting": "measure", "choose": "systems", "run": "_run"})
