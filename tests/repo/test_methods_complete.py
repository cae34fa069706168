"""Every registered method has a docs page in the common shape, a claim and a case line in its room's suite."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from trimtab.core.registry import METHOD_ROOMS, MethodInfo, method_class, methods

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
HEADINGS = ("What it does", "Why", "Example", "Measured cost and quality", "When it fails", "Options", "Paper")
METHODS = list(methods().values())


def sections(page: str) -> dict[str, str]:
    """Heading of the second level -> the text below it, in order."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return {title.strip(): body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def page_of(method: MethodInfo) -> dict[str, str]:
    path = PAGES / f"{method.name}.md"
    assert path.exists(), f"{method.name} has no page: copy docs/methods/_skeleton.md to {path.relative_to(ROOT)}"
    return sections(path.read_text(encoding="utf-8"))


def by_name(method: MethodInfo) -> str:
    return method.name


def test_there_are_methods() -> None:
    assert METHODS


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_has_a_page_in_the_common_shape(method: MethodInfo) -> None:
    found = page_of(method)
    assert tuple(found) == HEADINGS, f"{method.name}: the headings of a method's page are {HEADINGS}"
    empty = [title for title, body in found.items() if not body]
    assert not empty, f"{method.name}: nothing under {empty}"


def test_the_skeleton_has_the_common_shape() -> None:
    assert tuple(sections((PAGES / "_skeleton.md").read_text(encoding="utf-8"))) == HEADINGS


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_page_lists_each_option_with_its_default(method: MethodInfo) -> None:
    rows = [line for line in page_of(method)["Options"].splitlines() if line.startswith("| `")]
    listed = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        listed[cells[0].strip("`")] = cells[1].strip("`")
    fields = dataclasses.fields(method_class(method.name))
    expected = {
        field.name: "required" if field.default is dataclasses.MISSING else repr(field.default) for field in fields
    }
    assert listed == expected


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_page_names_the_paper(method: MethodInfo) -> None:
    number = re.search(r"arXiv:(\d{4}\.\d{4,5})", method.paper)
    text = page_of(method)["Paper"]
    assert (number.group(1) if number else method.paper) in text


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_page_is_in_the_navigation(method: MethodInfo) -> None:
    assert f"methods/{method.name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_has_a_claim(method: MethodInfo) -> None:
    module = importlib.import_module(f"trimtab.claims.{method.name}")
    assert module.CLAIMS
    assert all(claim.system == method.name for claim in module.CLAIMS)


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_has_a_case_line(method: MethodInfo) -> None:
    path = ROOT / "tests" / method.room / "cases.py"
    assert path.exists(), f"the room {method.room} has no list of cases: {path.relative_to(ROOT)}"
    assert re.search(rf"[\"']{method.name}[\"']", path.read_text(encoding="utf-8")), f"no line for {method.name}"


@pytest.mark.parametrize("room", [r for r in METHOD_ROOMS if importlib.util.find_spec(f"trimtab.{r}")])
def test_room_has_its_front_files(room: str) -> None:
    folder = ROOT / "src" / "trimtab" / room
    assert (folder / "base.py").exists()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    unnamed = [m.name for m in METHODS if m.room == room and f"`{m.name}`" not in readme]
    assert not unnamed, f"{room}/README.md does not say when to use {unnamed}"
