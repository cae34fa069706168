"""Pruning and structure on one model, at equal sizes: every method beside the trivial ones.

unstructured    50 %, and 2 of every 4: magnitude, wanda, sparsegpt, gblm
structured      10, 20 and 30 % of the whole model's parameters, embeddings and head included: modegpt and prunenet
                beside random neurons and the largest rows, with and without repair
inputs          40, 50 and 60 % of each weight not read: rsparse, beside thresholds on the inputs alone (TEAL)

Three seeds of the calibration text, and one of the model with outlier channels; texts and tasks are those of
`weights_survey`, with closed-book facts besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.evaluation import weights_survey
from trimtab.evaluation.weights_survey import Runs

GROUPS = ("unstructured", "structured", "inputs")
TASKS = ("prose", "recall", "arithmetic", "facts")
RUNS: Runs = (("plain", 0), ("plain", 1), ("plain", 2), ("outliers", 0))
SHARES = (0.1, 0.2, 0.3)
READ = (0.4, 0.5, 0.6)

Setting = tuple[str, str, dict[str, Any]]
"""Group, method, options."""


def settings(model: str = "ref") -> list[Setting]:
    """What is measured."""
    found: list[Setting] = [
        ("unstructured", name, {"sparsity": sparsity, "value_dtype": "bfloat16"})
        for sparsity in (0.5, "2:4")
        for name in ("magnitude", "wanda", "sparsegpt", "gblm")
    ]
    for share in SHARES:
        found += [("structured", name, options) for name, options in _structured(model, share)]
    ways: list[dict[str, Any]] = [
        {"alpha": 1.0, "criterion": "magnitude"},
        {"alpha": 0.95},
        {"alpha": "searched"},
    ]
    found += [("inputs", "rsparse", {"sparsity": sparsity, **way}) for sparsity in READ for way in ways]
    return found


def _structured(model: str, share: float) -> Iterable[tuple[str, dict[str, Any]]]:
    """`share` of the whole model's parameters. MoDeGPT counts the widths of blocks, so its share is scaled to that."""
    repairs: list[dict[str, Any]] = [{"repair": "none"}, {"repair": "least_squares"}]
    whole = {"sparsity": share, "counted": "parameters"}
    for score in ("random", "row_norm"):
        yield from (("neurons", {**whole, "score": score, **repair}) for repair in repairs)
    yield "neurons", {**whole, "score": "energy_down", "repair": "least_squares"}
    yield from (("prunenet", {**whole, **repair}) for repair in repairs)
    mlp, blocks = _shares_of(model)
    yield from (("modegpt", {"sparsity": round(share / blocks, 4), "round_to": 1, **repair}) for repair in repairs)
    yield "modegpt", {"sparsity": round(share / blocks, 4), "round_to": 1, "score": "energy_down"}
    yield "modegpt", {"sparsity": round(share / mlp, 4), "round_to": 1, "parts": ("mlp",)}


def _shares_of(model: str) -> tuple[float, float]:
    """The shares of a model's parameters that are in the linears of its MLPs, and of its blocks."""
    from trimtab.models import load
    from trimtab.models.info import stored_tensors
    from trimtab.models.views import ModelView

    loaded = load(model)
    whole = sum(tensor.numel() for tensor in stored_tensors(loaded).values())
    blocks = ModelView.of(loaded).blocks
    mlp = sum(x.out_features * x.in_features for block in blocks for x in block.mlp.linears)
    rest = sum(x.out_features * x.in_features for block in blocks for x in block.attention.linears)
    return mlp / whole, (mlp + rest) / whole


def survey(
    methods: Sequence[str] = (),
    model: str = "ref",
    *,
    runs: Runs = RUNS,
    second_text: Path | None = None,
    processes: int = 2,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """As `weights_survey.survey`, each entry with its "group".

    methods    those that are measured; none: all
    runs       of every setting but those with a search, which run once
    """
    chosen = [setting for setting in settings(model) if not methods or setting[1] in methods]
    document: dict[str, Any] = {}
    entries = []
    for often in (True, False):
        asked = [setting for setting in chosen if _is_cheap(setting[2]) == often]
        if not asked:
            continue
        found = weights_survey.survey(
            [(name, options) for _, name, options in asked],
            model,
            runs=runs if often else runs[:1],
            second_text=second_text,
            tasks=TASKS,
            processes=processes,
            tell=tell,
        )
        document = {**found, **document}
        entries += [{"group": group, **entry} for (group, _, _), entry in zip(asked, found["entries"], strict=True)]
    return {**document, "entries": sorted(entries, key=lambda entry: GROUPS.index(entry["group"]))}


def _is_cheap(options: Mapping[str, Any]) -> bool:
    return options.get("alpha") != "searched"
