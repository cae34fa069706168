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
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    start = page.index("<!-- results: compare -->")
    tampered = page[:start] + page[start:].replace("\n\n", "\n\nexcellent, trust us\n", 1)
    assert tables.drawn(tampered) == tables.drawn(page)
    assert tampered != tables.drawn(tampered)


def test_every_mark_is_closed(tables: ModuleType) -> None:
    for path in tables.documents_with_tables():
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"<!-- results: ", text)) == len(tables.MARKED.findall(text)), path


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: Path) -> None:
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cores-\d{4}-\d{2}-\d{2}", path.stem), "THEME-MACHINE-DATE.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "versions"} <= set(document)


def test_names_of_machines_fit_file_names() -> None:
    name = script("record_results").machine_name
    assert name({"cpu": "Intel(R) Xeon(R) CPU @ 2.70GHz", "cores": 2}) == "intel-r-xeon-r-cpu-2-70ghz-2-cores"
    assert name({"cpu": "AMD EPYC", "cores": 16}) == "amd-epyc-16-cores"


def _record(label: str, method: str | None) -> dict[str, object]:
    recall = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "undefined": 0}
    return {
        "command": "compare",
        "config": {"label": label, "method": method, "bits": 4 if method else None},
        "ledger": {"bytes_at_rest": 7_000_000, "keep_fraction": 0.5, "bits_per_weight": 4.375 if method else None},
        "metrics": {"tasks": {"recall": {"exact_match": recall}}, "main_metrics": [["recall", "exact_match"]]},
        "seconds": {"compress": 3.0} if method else {},
    }


DOCUMENT = {
    "date": "2026-01-02",
    "machine": {"cpu": "A Processor", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "file": "benchmarks/results/x-y-2-cores-2026-01-02.json",
}


def test_compare_table(tables: ModuleType) -> None:
    records = [_record("uncompressed", None), _record("rtn 4-bit", "rtn"), _record("gptq 4-bit", "gptq")]
    drawn = tables.compare_table({**DOCUMENT, "records": records}, "rtn")
    assert [line.split("|")[1].strip() for line in drawn.splitlines()[2:4]] == ["uncompressed", "rtn 4-bit"]
    assert "gptq" not in drawn
    assert "0.500 [0.400, 0.600]" in drawn
    assert "A Processor, 2 cores, torch 2.13.0, 2026-01-02" in drawn


def test_a_method_without_results_has_no_table(tables: ModuleType) -> None:
    assert tables.compare_table({**DOCUMENT, "records": [_record("uncompressed", None)]}, "rtn") == ""


def test_claims_table_shows_what_does_not_hold(tables: ModuleType) -> None:
    verdict = {"claim": "A | B", "measured": {"kl_nats": 0.5}, "baseline": {}, "holds": False, "system": "rtn"}
    drawn = tables.claims_table({**DOCUMENT, "verdicts": [verdict]}, "rtn")
    assert "| A \\| B | kl nats 0.5 |  | does not hold here |" in drawn


def test_grid_matmul_table(tables: ModuleType) -> None:
    def entry(system: str, batch: int, ms: float) -> dict[str, object]:
        figures = {"decode_ms_median": ms, "read_gbps_median": 30.0, "bandwidth_share": 0.75}
        return {"system": system, "setting": f"8x8, batch {batch}, group 64", **figures}

    entries = [entry("torch", 1, 6.0), entry("native, 4 bits", 1, 2.0), entry("native, 4 bits", 16, 9.0)]
    drawn = tables.grid_matmul_table({**DOCUMENT, "entries": entries}, "batch-1")
    assert "| 8x8, batch 1, group 64 | native, 4 bits | 2 | 3 | 30 | 75% |" in drawn
    assert "batch 16" not in drawn


def test_evaluate_table(tables: ModuleType) -> None:
    model = {"tasks": {"facts": {"exact_match": {"value": 0.9, "low": 0.8, "high": 0.95}}}}
    drawn = tables.evaluate_table({**DOCUMENT, "models": {"ref": model, "ref-mini": model}}, None)
    assert "| facts | exact match | 0.900 [0.800, 0.950] | 0.900 [0.800, 0.950] |" in drawn
