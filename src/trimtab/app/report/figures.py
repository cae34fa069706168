"""Pictures as SVG that takes the colours of the page it stands in: Pareto fronts, bars."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from trimtab.app.report.rows import Interval, pareto_front

# Told apart with the common colour blindnesses (Okabe and Ito's set, adjusted); the page has a lighter set for dark.
_COLOURS = ("#0a84c1", "#d9730d", "#159a76", "#b65fa0", "#a68a00", "#c0483b")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Stand-ins that are replaced by CSS after drawing, so that one picture serves light and dark.
_INK, _FAINT = "#010203", "#030201"


class Point(Protocol):
    """What a picture needs to know of a row."""

    @property
    def label(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def baseline(self) -> bool: ...


P = TypeVar("P", bound=Point)


def pareto_svg(
    rows: Sequence[P],
    quality: Callable[[P], Interval | None],
    label: str,
    *,
    cost: Callable[[P], float],
    cost_label: str,
    logarithmic: bool,
) -> str:
    """Quality (smaller is better) against cost, as inline SVG. Empty if no compressed row has the figure."""
    points = [(row, value) for row in rows if (value := quality(row)) is not None and not row.baseline]
    if logarithmic:
        points = [(row, value) for row, value in points if value.value > 0]
    if not points:
        return ""
    plt, style = _pyplot()
    from matplotlib.ticker import FuncFormatter

    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
        methods = list(dict.fromkeys(row.method for row, _ in points))
        for index, method in enumerate(methods):
            own = [(row, value) for row, value in points if row.method == method]
            x = [cost(row) for row, _ in own]
            y = [value.value for _, value in own]
            low = [v.value - (v.value if v.low is None else min(v.low, v.value)) for _, v in own]
            high = [(v.value if v.high is None else max(v.high, v.value)) - v.value for _, v in own]
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            axes.errorbar(x, y, (low, high), fmt=marker, color=colour, ms=7, capsize=3, lw=1.2, label=method, zorder=3)
            for px, py, (row, _) in zip(x, y, own, strict=True):
                text = row.label.removeprefix(method).strip() or row.label
                offset, side = ((8, 5), "left") if index % 2 == 0 else ((-8, -13), "right")
                axes.annotate(
                    text, (px, py), offset, textcoords="offset points", ha=side, fontsize=9, color=colour, zorder=4
                )
        front = pareto_front((cost(row), value.value) for row, value in points)
        axes.plot(*zip(*front, strict=True), color=_FAINT, lw=1.2, ls="--", label="Pareto front", zorder=1)
        base = next((value for row in rows if row.baseline and (value := quality(row)) is not None), None)
        if base is not None and not logarithmic:
            axes.axhline(base.value, color=_FAINT, lw=1, ls=":", label="uncompressed", zorder=1)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_log_tick))
            axes.yaxis.set_minor_formatter(FuncFormatter(_log_tick))
        axes.set_xlabel(cost_label)
        axes.set_ylabel(label)
        axes.margins(x=0.14, y=0.14)
        axes.grid(True, color=_FAINT, lw=0.5, alpha=0.35)
        axes.legend(frameon=False, fontsize=9)
        return _svg(plt, figure, f"{label} against {cost_label}; the same figures are in the table.")


def bars_svg(labels: Sequence[str], values: Sequence[float], label: str) -> str:
    """A horizontal bar for each label, the first one faint, as inline SVG."""
    plt, style = _pyplot()
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(5.6, 0.8 + 0.36 * len(labels)), layout="constrained")
        places = range(len(labels))[::-1]
        drawn = axes.barh(places, values, color=[_FAINT, *[_COLOURS[0]] * (len(labels) - 1)], height=0.62)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=4)
        axes.set_yticks(places, labels)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        return _svg(plt, figure, f"{label} of each row; the same figures are in the table.")


def _pyplot() -> tuple[Any, dict[str, Any]]:
    """matplotlib without a display, and the style of all pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "trimtab",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return pyplot, style


def _svg(plt: Any, figure: Any, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return _inline(buffer.getvalue(), description)


def _log_tick(value: float, _position: object) -> str:
    """Plain numbers at 1, 2 and 5 of each decade."""
    return f"{value:g}" if value > 0 and f"{value:e}"[0] in "125" else ""


def _inline(svg: str, description: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    # Two pictures on one page must not share ids.
    prefix = f"p{zlib.crc32(description.encode()):x}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}', body)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body)
    body = body.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    for index, colour in enumerate(_COLOURS):
        body = body.replace(colour, f"var(--series-{index})")
    return body.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
