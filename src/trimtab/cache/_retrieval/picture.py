"""A heat map of retrieval scores, layers by heads."""

from __future__ import annotations

import io
from pathlib import Path

from trimtab.cache._retrieval.scores import HeadScores
from trimtab.core.errors import ConfigError
from trimtab.core.files import atomic_file

_FORMATS = ("png", "svg")
_LABELLED = 256


def draw(scores: HeadScores, path: str | Path) -> None:
    """Write the heat map as PNG or SVG, by the name's ending, atomically; retrieval heads are framed.

    Equal scores give equal bytes. Raises ConfigError for another ending, OutputError.
    """
    path = Path(path)
    ending = path.suffix.lower().lstrip(".")
    if ending not in _FORMATS:
        raise ConfigError(f"a picture is written as .png or .svg, not as {path.name!r}.")
    content = _rendered(scores, ending)
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def _rendered(scores: HeadScores, ending: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    values = scores.scores.numpy()
    layers, heads = values.shape
    with rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none"}):
        size = (min(2.6 + 0.45 * heads, 12.0), min(1.6 + 0.35 * layers, 12.0))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        for layer, head in scores.retrieval_heads:
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="#d9730d", lw=1.5))
        if values.size <= _LABELLED:
            for layer in range(layers):
                for head in range(heads):
                    score = values[layer, head]
                    colour = "black" if score > 0.6 else "white"
                    axes.text(head, layer, f"{score:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(
            f"{len(scores.retrieval_heads)} of {values.size} heads > {scores.threshold:g}\n"
            f"{len(scores.counted)} of {len(scores.trials)} trials counted",
            fontsize=9,
        )
        figure.colorbar(image, ax=axes, label="retrieval score")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=150, metadata={"Date": None} if ending == "svg" else None)
    return buffer.getvalue()
