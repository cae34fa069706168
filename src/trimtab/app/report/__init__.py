"""A comparison as one self-contained HTML file, drawn from run records and nothing else.

    rows.py      records -> rows with intervals, the Pareto front
    text.py      how figures are written
    figures.py   the pictures
    page.py      the page

Draw one again, after editing the template or on another machine: `python -m trimtab.app.report DIR/runs`.
"""

from __future__ import annotations

from trimtab.app.report.page import render, write_report

__all__ = ["render", "write_report"]
