"""Habits of the repository that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "trimtab"
MAX_LINES = {"src": 400, "scripts": 400, "tests": 500}

TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".cpp", ".h", ".html", ".css", ".cfg", ""}


def committed() -> list[Path]:
    """Files that are in the repository or would be with the next commit; all of them where git is not at hand."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        folders = ("src", "tests", "docs", "scripts", "benchmarks")
        return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def python_files() -> list[Path]:
    return [path for path in committed() if path.suffix == ".py"]


def test_modules_are_short_enough_to_read() -> None:
    long = {}
    for path in python_files():
        relative = path.relative_to(ROOT)
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES.get(relative.parts[0], 400):
            long[str(relative)] = count
    assert not long, f"split these, the limits are {MAX_LINES} lines: {long}"


def test_no_drawers() -> None:
    """A folder or file called utils, helpers or misc says nothing about what is in it."""
    drawers = [str(p.relative_to(ROOT)) for p in python_files() if p.stem in ("utils", "helpers", "misc", "common")]
    assert not drawers


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?<![\w./~-])/(?:work|root|home/\w+|tmp/tv)/[\w.]", "a path of one machine"),
        (r"(?:--|^)(?:extra-)?index-url|--find-links|PIP_INDEX", "where packages come from is the user's choice"),
        (r"^(?:<{7}|>{7}) ", "a merge conflict"),
        (r"(?:ghp|hf)_[A-Za-z0-9]{30,}", "a secret"),
    ],
)
def test_no_file_holds(pattern: str, why: str) -> None:
    found = []
    for path in committed():
        if path == Path(__file__).resolve() or path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 2_000_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {m.group(0)}" for m in re.finditer(pattern, text, re.MULTILINE)]
    assert not found, f"{why}: {found}"


def test_no_large_files() -> None:
    """Large files are shipped only as package assets."""
    large = [
        str(path.relative_to(ROOT))
        for path in committed()
        if path.stat().st_size > 1_000_000 and not path.is_relative_to(PACKAGE / "assets")
    ]
    assert not large


def _heavy_imports(path: Path) -> list[str]:
    """torch and transformers imports that run when the module is imported."""
    heavy = []

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                heavy.extend(a.name for a in node.names if a.name.split(".")[0] in ("torch", "transformers"))
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                if (node.module or "").split(".")[0] in ("torch", "transformers"):
                    heavy.append(str(node.module))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif isinstance(node, (ast.If, ast.With, ast.Try)):
                visit([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return heavy


def light_modules() -> list[Path]:
    return [
        PACKAGE / "__init__.py",
        PACKAGE / "__main__.py",
        PACKAGE / "models" / "registration.py",
        *sorted((PACKAGE / "core").rglob("*.py")),
        *sorted((PACKAGE / "app" / "cli").rglob("*.py")),
    ]


def test_light_modules_import_no_torch() -> None:
    heavy = {str(p.relative_to(ROOT)): found for p in light_modules() if (found := _heavy_imports(p))}
    assert not heavy, f"import torch and transformers inside the functions of these: {heavy}"


def test_the_check_for_heavy_imports_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("try:\n    import torch.nn\nexcept ImportError:\n    pass\ndef f():\n    import transformers\n")
    assert _heavy_imports(path) == ["torch.nn"]


def test_every_page_is_in_the_navigation() -> None:
    # mkdocs.yml holds tags (`!!python/name:...`) that only mkdocs resolves.
    text = re.sub(r"!!python/\S+", "''", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load(text)

    def pages(nav: object) -> set[str]:
        if isinstance(nav, str):
            return {nav}
        entries = nav.values() if isinstance(nav, dict) else nav
        assert isinstance(entries, (list, type({}.values())))
        return set().union(*(pages(entry) for entry in entries))

    written = {
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if not path.name.startswith("_")
    }
    assert pages(config["nav"]) == written


def test_the_pinned_torch_is_the_same_everywhere() -> None:
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin is not None
    assert f"torch=={pin.group(1)}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    import trimtab

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{trimtab.__version__}"' in project
    assert f"## {trimtab.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
