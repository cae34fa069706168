"""Comparison of two models on the same documents: paired differences, flips, recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.errors import DataError
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Comparison, TaskResult


def compare(reference: Mapping[str, TaskResult], model: Mapping[str, TaskResult]) -> list[Comparison]:
    """All metrics that both have per document, in the order of `model`. Raises DataError if the documents differ."""
    found: list[dict[str, Any]] = []
    for name, result in model.items():
        if name not in reference:
            continue
        base = reference[name]
        if base.ids != result.ids:
            raise DataError(
                f"task '{name}': the two models were asked different documents ({len(base.ids)} and "
                f"{len(result.ids)}); use the same limit, seed and text."
            )
        found += [
            _compared(name, metric, better, base, result)
            for metric, better in result.higher_is_better.items()
            if metric in result.values and metric in base.values
        ]
    adjusted = statistics.holm([entry["p_value"] for entry in found])
    return [Comparison(**entry, p_holm=p) for entry, p in zip(found, adjusted, strict=True)]


def _compared(task: str, metric: str, better: bool, base: TaskResult, model: TaskResult) -> dict[str, Any]:
    pairs = [
        (float(a), float(b), cluster)
        for a, b, cluster in zip(base.values[metric], model.values[metric], model.clusters, strict=True)
        if a is not None and b is not None
    ]
    before, after = [a for a, _, _ in pairs], [b for _, b, _ in pairs]
    own = [cluster for _, _, cluster in pairs]
    clusters = own if any(c is not None for c in own) else None
    differences = [b - a for a, b in zip(before, after, strict=True)]
    binary = set(before) | set(after) <= {0.0, 1.0}
    gained, lost = (sum(d > 0 for d in differences), sum(d < 0 for d in differences)) if binary else (None, None)
    top, bottom = (after, before) if better else (before, after)
    return {
        "task": task,
        "metric": metric,
        "higher_is_better": better,
        "difference": statistics.mean(differences, clusters),
        "recovery": statistics.ratio_of_sums(top, bottom, clusters) if sum(bottom) > 0 and min(bottom) >= 0 else None,
        "gained": gained,
        "lost": lost,
        "p_value": (
            statistics.mcnemar(gained, lost)
            if gained is not None and lost is not None
            else statistics.paired_t(differences, clusters)
        ),
        "detectable": statistics.minimum_detectable_effect(differences, clusters),
    }
