"""How figures are written, the same in the terminal and on the page."""

from __future__ import annotations

from trimtab.app.report.rows import Interval

NOTHING = "–"


def size(count: float) -> str:
    """Bytes in decimal units: 6.91 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(value: float | None) -> str:
    """Three significant digits, without exponents between 0.001 and 100,000."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 100_000 or magnitude < 0.001:
        return f"{value:.2e}"
    return f"{value:,.0f}" if magnitude >= 100 else f"{value:.3g}"


def interval(value: Interval | None) -> str:
    """0.512 [0.498, 0.526]; digits follow the width of the interval."""
    if value is None:
        return NOTHING
    if value.low is None or value.high is None:
        return number(value.value)
    return f"{_shown(value.value)} {bounds(value)}"


def bounds(value: Interval | None) -> str:
    """The interval alone: [0.498, 0.526]; empty where there is none."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"[{_shown(value.low)}, {_shown(value.high)}]"


def _shown(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 or value == 0 else number(value)


def point(value: Interval | None) -> str:
    """The value alone."""
    return NOTHING if value is None else _shown(value.value)


def seconds(value: float | None) -> str:
    """Seconds, or minutes from 100 seconds on."""
    if value is None:
        return NOTHING
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"
