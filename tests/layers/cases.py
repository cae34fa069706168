"""One line per method and set of options; the shared suite runs every check on every line."""

from __future__ import annotations

from typing import Any

_SMALL_SEARCH = {"population": 4, "generations": 1, "survivors": 2, "search_sequences": 4}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rsparse", {}),
    ("rsparse", {"alpha": 1.0, "criterion": "magnitude"}),
    ("rsparse", {"sparsity": 0.6, "alpha": 0.7, "factor_dtype": "float16"}),
    ("rsparse", {"alpha": "searched", **_SMALL_SEARCH}),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("rsparse", {"sparsity": 0.0}, r"sparsity=0\.0 must be above 0 and below 1"),
    ("rsparse", {"sparsity": 1.0}, r"sparsity=1\.0 must be above 0 and below 1"),
    ("rsparse", {"sparsity": float("nan")}, "sparsity=nan must be above 0 and below 1"),
    ("rsparse", {"alpha": 0.0}, r"alpha=0\.0 must be above 0 and at most 1, or 'searched'"),
    ("rsparse", {"alpha": 1.01}, r"alpha=1\.01 must be above 0"),
    ("rsparse", {"alpha": "best"}, "alpha='best' cannot be used"),
    ("rsparse", {"criterion": "norm"}, "criterion='norm' cannot be used"),
    ("rsparse", {"prefill": "half"}, "prefill='half' cannot be used"),
    ("rsparse", {"survivors": 32}, "survivors=32 must be at least 2 and below population=32"),
    ("rsparse", {"survivors": 1}, "survivors=1 must be at least 2"),
    ("rsparse", {"generations": 0}, "generations=0 must be at least 1"),
    ("rsparse", {"search_sequences": 0}, "search_sequences=0 must be at least 1"),
]
"""Options that no model fits, and what the error says."""

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]
