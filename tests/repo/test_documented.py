"""Public names are documented: where they are defined, and on the page of the Python interface."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import trimtab

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "trimtab"


def _undocumented(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(PACKAGE).as_posix()
    missing = [] if ast.get_docstring(tree) else [name]
    return missing + [
        f"{name}: {node.name}"
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]


def test_modules_classes_and_functions_have_docstrings() -> None:
    """Experiments of claims have none: the text of their Claim is what documents them."""
    missing = [entry for path in sorted(PACKAGE.rglob("*.py")) for entry in _undocumented(path)]
    missing = [entry for entry in missing if not entry.startswith("claims/") or ": " not in entry]
    assert not missing


def test_public_names_are_on_the_page_of_the_python_interface() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in dir(trimtab) if f"`tt.{name}" not in page]
    assert not missing


def test_every_error_is_in_the_index() -> None:
    from trimtab.core import errors

    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    tree = [name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, Exception)]
    missing = [name for name in tree if f"`{name}`" not in page]
    assert not missing


def test_every_task_is_on_the_page_of_evaluation() -> None:
    from trimtab.evaluation.tasks import task_names

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    missing = [name for name in task_names() if f"| `{name}` |" not in page]
    assert not missing


def test_every_kind_of_part_is_on_the_page_of_formats() -> None:
    import pkgutil

    from trimtab import tensors
    from trimtab.tensors.base import PART_KINDS

    for module in pkgutil.iter_modules(tensors.__path__, "trimtab.tensors."):
        importlib.import_module(module.name)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    ours = [kind for kind, cls in PART_KINDS.items() if cls.__module__.startswith("trimtab.")]
    assert ours
    assert not [kind for kind in ours if f"| `{kind}` |" not in page]
