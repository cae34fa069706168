"""The report: drawn from records alone, complete, self-contained, safe."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.app.report import text
from trimtab.app.report.__main__ import main as report_main
from trimtab.app.report.page import render, write_report
from trimtab.app.report.rows import Interval, load_records, main_metrics, pareto_front, row_of
from trimtab.core.errors import DataError
from trimtab.core.run_record import RunRecord

_LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in _LOADING]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_page_loads_nothing(records: list[RunRecord]) -> None:
    page = render(records)
    parsed = _Page(page)
    assert all(load.startswith(("#", "data:")) for load in parsed.loads)
    assert not re.search(r"https?://", page)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "script" not in parsed.tags
    assert len(parsed.ids) == len(set(parsed.ids))


def test_page_shows_every_run_and_figure(records: list[RunRecord]) -> None:
    page = render(records)
    for record in records:
        assert page.count(record.config["label"]) >= 3  # table, record, JSON
    assert "0.050" in page  # KL of rtn at 4 bits
    assert "[0.045, 0.055]" in page
    assert "13.8 MB" in page
    assert records[0].machine["cpu"] in page
    assert records[0].versions["torch"] in page


def test_pictures_are_described_svg(records: list[RunRecord]) -> None:
    pictures = re.findall(r"<svg.*?</svg>", render(records), flags=re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert 'role="img"' in picture
        assert "aria-label=" in picture
        assert "gptq" in picture
        assert "var(--ink)" in picture


def test_drawing_twice_gives_the_same_page(records: list[RunRecord], tmp_path: Path) -> None:
    for index, record in enumerate(records):
        record.save(tmp_path / "runs" / f"{index:02}.json")
    assert report_main([str(tmp_path / "runs")]) == 0
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path / "runs", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == first


def test_text_of_records_is_escaped(records: list[RunRecord]) -> None:
    records[1].metrics["samples"] = [{"prompt": "<script>alert(1)</script>", "text": "</pre><b>"}]
    page = render(records)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_missing_figures_are_shown_as_missing(records: list[RunRecord]) -> None:
    for record in records:
        record.metrics = {"tasks": {}}
    assert text.NOTHING in render(records)


def test_foreign_records_are_refused(records: list[RunRecord], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'train'"):
        row_of(RunRecord(command="train"))
    with pytest.raises(DataError, match="no run records"):
        load_records(tmp_path)
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"broken\.json"):
        load_records(tmp_path)
    assert report_main([str(tmp_path)]) == 2


def test_main_metric_of_each_task(records: list[RunRecord]) -> None:
    assert main_metrics([row_of(record) for record in records]) == [("recall", "exact_match")]


finite = st.floats(0.0, 1e9, allow_nan=False)


@given(st.lists(st.tuples(finite, finite), min_size=1))
def test_front_holds_exactly_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


@given(st.integers(0, 10**15))
def test_sizes_are_right_to_one_percent(count: int) -> None:
    shown, unit = text.size(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(shown) * scale == pytest.approx(count, rel=0.01, abs=0.5)


def test_figures_as_text() -> None:
    assert text.interval(Interval(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert text.interval(Interval(0.5)) == "0.5"
    assert text.interval(None) == text.NOTHING
    assert text.number(1234.5) == "1,234"
    assert text.number(1e-5) == "1.00e-05"


def test_a_comparison_of_caches_has_columns_of_its_own(records: list[RunRecord]) -> None:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.001, "high": value + 0.001}

    plain = RunRecord(command="compare", config={"kind": "caches", "label": "uncompressed", "method": None})
    plain.metrics = {"divergence": {"bits_per_byte": interval(1.522)}, "recall": {"16 words at 128": interval(0.99)}}
    kivi = RunRecord(command="compare", config={"kind": "caches", "label": "kivi 2-bit", "method": "kivi"})
    kivi.metrics = {
        "bits": {"bits": 4.53, "encoded": 3.0, "nbytes": 2_375_680},
        "divergence": {"kl_nats_per_token": interval(0.022), "bits_per_byte": interval(1.529)},
        "attention": {"output": 0.107, "keys": 0.272, "values": 0.382},
        "recall": {"16 words at 128": interval(0.97)},
        "speed": {"decode_tokens_per_second_median": 321.0},
    }
    page = render([plain, kivi])
    for shown in ("4.53", "2.38 MB", "[0.021, 0.023]", "0.970", "0.382", "321", "16 words at 128", "bits / element"):
        assert shown in page
    assert len(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)) == 2
    assert "bits at rest" not in page
    with pytest.raises(DataError, match="not one of a comparison of caches"):
        render([plain, records[0]])
