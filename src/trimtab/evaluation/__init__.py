"""Floor 2: what a model can do, and what an intervention cost it, always with intervals. Read base.py first.

Names are imported on first use, so that listing tasks needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation._evaluate import evaluate as evaluate
    from trimtab.evaluation._evaluate import to_json as to_json
    from trimtab.evaluation.client import LocalClient as LocalClient
    from trimtab.evaluation.comparison import compare as compare
    from trimtab.evaluation.kl import Divergence as Divergence
    from trimtab.evaluation.kl import NextTokens as NextTokens
    from trimtab.evaluation.kl import divergence as divergence
    from trimtab.evaluation.kl import fidelity as fidelity
    from trimtab.evaluation.outliers import inject_outliers as inject_outliers
    from trimtab.evaluation.tasks import task as task
    from trimtab.evaluation.tasks import task_names as task_names

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Divergence": "kl",
        "LocalClient": "client",
        "NextTokens": "kl",
        "compare": "comparison",
        "divergence": "kl",
        "evaluate": "_evaluate",
        "fidelity": "kl",
        "inject_outliers": "outliers",
        "task": "tasks",
        "task_names": "tasks",
        "to_json": "_evaluate",
    },
)
