"""What is written where: JSON without infinities, tables that fit the terminal."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from trimtab.app.cli import output


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("é", None), 4: True})
    written = capsys.readouterr().out
    assert written.count("\n") == 1
    told = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told == {"a": None, "b": [None, 1.5], "c": ["é", None], "4": True}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_wide_tables_keep_every_figure_in_any_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["method", *(f"figure number {i}" for i in range(9))]
    rows = [[f"method {r}", *(f"{r}.{i}\n[{r}.0, {r}.9]" for i in range(9))] for r in range(3)]
    console = Console(width=width, highlight=False)
    monkeypatch.setattr(output, "_console", lambda: console)
    with console.capture() as captured:
        output.show(*output.wide_table("title", columns, rows))
    written = captured.get()
    assert "…" not in written
    assert max(map(len, written.splitlines())) <= width
    for r, row in enumerate(rows):
        assert all(cell.partition("\n")[0] in written for cell in row)
        assert written.count(f"method {r}") >= (1 if width == 200 else 2)


def test_cells_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output.show(output.table("t", ("a",), [("[bold]x[/bold] [1.0, 2.0]",)]))
    assert "[bold]x[/bold] [1.0, 2.0]" in capsys.readouterr().out
