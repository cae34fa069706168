"""Tables in documents say what the committed result files say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("results_tables")


def test_tables_are_drawn_from_the_result_files(tables: ModuleType) -> None:
    stale = [
        path.relative_to(ROOT).as_posix()
        for path in tables.documents_with_tables()
        if tables.drawn(text := path.read_text(encoding="utf-8")) != text
    ]
    assert not stale, f"run `make readme`: {stale}"


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    """The check above can fail: a figure changed by hand is drawn back."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = readme.index("<!-- results: compare -->")
    tampered = readme[:start] + readme[start:].replace("\n\n", "\n\nexcellent, trust us\n", 1)
    assert tables.drawn(tampered) == tables.drawn(readme)
    assert tampered != tables.drawn(tampered)


def test_every_mark_is_closed(tables: ModuleType) -> None:
    for path in tables.documents_with_tables():
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"<!-- results: ", text)) == len(tables.MARKED.findall(text)), path


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: Path) -> None:
    assert re.fullmatch(r"[a-z]\w*_[a-z0-9-]+_\d{4}-\d{2}-\d{2}", path.stem), "THEME_MACHINE_DATE.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"started", "machine", "versions"} <= set(document)
    assert document["started"].startswith(path.stem.rpartition("_")[2])


def test_names_of_machines_are_short(tables: ModuleType) -> None:
    name = script("record_results").machine_name
    assert name({"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 2}) == "xeon-platinum-8481c-2"
    assert name({"cpu": "AMD EPYC", "cores": 16}) == "amd-epyc-16"
