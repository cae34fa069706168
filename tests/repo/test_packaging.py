"""Every dependency has the version it was tested with, and the wheel holds what the package reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group(0)).lower()


def pinned(file: str) -> set[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in entry for entry in entries), "a constraint is an exact version"
    return {normalised(entry) for entry in entries}


@pytest.mark.parametrize(
    ("extra", "file"),
    [
        (None, "constraints.txt"),
        ("test", "constraints.txt"),
        ("dev", "constraints.txt"),
        ("docs", "constraints.txt"),
        ("peers", "constraints-peers.txt"),
        ("test", "constraints-peers.txt"),
    ],
)
def test_dependencies_are_pinned(extra: str | None, file: str) -> None:
    declared = project()["project"]
    wanted = declared["dependencies"] if extra is None else declared["optional-dependencies"][extra]
    missing = {normalised(r) for r in wanted} - {"trimtab"} - pinned(file)
    assert not missing, f"{file} lacks the tested version of {sorted(missing)}"


def test_the_package_holds_its_data() -> None:
    """What `importlib.resources` reads lies inside the package and is not ignored by the packager (.gitignore)."""
    assets = ROOT / "src" / "trimtab" / "assets"
    for model in ("ref", "ref-mini"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (assets / model).iterdir()}
    assert (assets / "text" / "prose_eval.txt").exists()
    assert (assets / "text" / "prose_calibration.txt").exists()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert not {"*.safetensors", "*.json", "*.txt", "assets/"} & set(ignored)


def test_the_command_exists() -> None:
    from trimtab.app.cli import main

    assert project()["project"]["scripts"]["trimtab"] == f"{main.__module__}:{main.__name__}"
