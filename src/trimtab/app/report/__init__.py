"""A comparison as one self-contained HTML file, drawn from run records and nothing else.

    rows.py      records -> rows with intervals, the Pareto front
    text.py      how figures are written
    figures.py   the pictures
    view.py      what a kind of comparison shows: weights_view.py, cache_view.py
    page.py      `render` and `write_report`: the page

Draw one again, after editing the template or on another machine: `python -m trimtab.app.report DIR/runs`.
"""
