"""Time and memory of compressing a model: trimtab's methods and other libraries' in one run on the same data.

systems     which systems there are, by name, and what each needs installed
_run        makes model and data once, and lets `beside` give each system a process of its own
measure     what is measured, the same for all
sessions    how each system compresses
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation.compress_time._run import run as run
    from trimtab.evaluation.compress_time.measure import Setting as Setting
    from trimtab.evaluation.compress_time.systems import choose as choose

__getattr__, __dir__ = lazy_exports(__name__, {"Setting": "measure", "choose": "systems", "run": "_run"})
