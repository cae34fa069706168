"""Lazy packages: names resolve on first use, and only those that are offered."""

from __future__ import annotations

import pytest

from trimtab.core.lazy import lazy_exports


def test_names_come_from_their_modules() -> None:
    get, names = lazy_exports("trimtab.core", {"Recipe": "recipe", "errors": "errors"})
    from trimtab.core import errors
    from trimtab.core.recipe import Recipe

    assert get("Recipe") is Recipe
    assert get("errors") is errors
    assert names() == ["Recipe", "errors"]


def test_other_names_are_refused() -> None:
    get, _ = lazy_exports("trimtab.core", {"Recipe": "recipe"})
    with pytest.raises(AttributeError, match="module 'trimtab.core' has no attribute 'Recip'"):
        get("Recip")
