"""Tell transformers how to read trimtab checkpoints, without importing transformers before the user does."""

from __future__ import annotations


def register_when_transformers_loads() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
