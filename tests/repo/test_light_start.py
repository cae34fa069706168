"""Importing trimtab and its command line starts at once: torch and transformers come with the first use."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import trimtab.core

LIGHT = ["trimtab", "trimtab.app.cli", *(f"trimtab.core.{m.name}" for m in pkgutil.iter_modules(trimtab.core.__path__))]


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str) -> None:
    code = (
        f"import {module}, sys; print([m for m in ('torch', 'transformers', 'scipy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_answers_without_the_heavy_libraries(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trimtab", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not {"torch", "transformers", "scipy"} & imported


def test_the_package_itself_imports_rooms_for_type_checkers_only() -> None:
    """import-linter does not look at `trimtab/__init__.py`; this does."""
    code = "import trimtab, sys; print(sorted(m for m in sys.modules if m.startswith('trimtab.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light = ["trimtab.core", "trimtab.core.lazy", "trimtab.models", "trimtab.models.registration"]
    assert done.stdout.strip() == str(light)
