"""Decoding methods: speed, tokens per forward pass of the target, what was accepted, whether the text is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.app.report import text
from trimtab.app.report.view import Cell, Line, View
from trimtab.core.errors import DataError
from trimtab.core.run_record import RunRecord

KIND = "decodings"
COLUMNS = (
    "decoding",
    "tokens/s",
    "ratio",
    "tokens / target pass",
    "draft passes",
    "nodes / pass",
    "accepted by depth",
    "accepted by rank",
    "same text",
    "lossless",
)
GLOSSARY = (
    ("tokens/s", "tokens written per second, one text at a time, median over the prompts"),
    ("ratio", "to plain decoding by the same loop"),
    ("tokens / target pass", "tokens that became text per forward pass of the target; 1 for plain decoding"),
    ("nodes / pass", "tokens that a forward pass of the target reads, the last one of the text included"),
    ("accepted by depth", "share of drafted tokens at depth 1, 2, ... that became text"),
    ("accepted by rank", "how many of those accepted were the first, second, ... of their siblings"),
    ("same text", "share of the tokens that are plain decoding's, up to the first difference of each text"),
    ("lossless", "the method follows the distribution that the model and its transforms define"),
)


def _cells(metrics: dict[str, Any], plain: dict[str, Any]) -> tuple[Cell, ...]:
    ledger = metrics["ledger"]
    shares = [a / d for a, d in zip(ledger["accepted_by_depth"], ledger["drafted_by_depth"], strict=False) if d]
    same, lossless = metrics.get("same_text"), metrics.get("lossless", True)
    found = (
        text.number(metrics["tokens_per_s"]),
        f"{metrics['tokens_per_s'] / plain['tokens_per_s']:.2f}",
        f"{ledger['tokens_per_target_forward']:.2f}",
        str(ledger["draft_forwards"]),
        f"{ledger['nodes_scored'] / ledger['rounds']:.1f}" if ledger["rounds"] else text.NOTHING,
        " ".join(f"{share:.2f}" for share in shares) or text.NOTHING,
        " ".join(map(str, ledger["accepted_by_rank"])) or text.NOTHING,
        text.NOTHING if same is None else f"{same:.0%}",
        "yes" if lossless else "no",
    )
    return tuple((cell, "") for cell in found)


def view(records: Sequence[RunRecord], *, pictures: bool) -> View:
    """Records of `trimtab compare --decodings`."""
    from trimtab.app.report.figures import bars_svg

    for record in records:
        if record.command != "compare" or record.config.get("kind") != KIND:
            raise DataError(f"a run record of '{record.command}' is not one of a comparison of decodings.")
    plain = records[0].metrics
    labels = [record.config["label"] for record in records]
    drawn = []
    if pictures:
        passes = [record.metrics["ledger"]["tokens_per_target_forward"] for record in records]
        speeds = [record.metrics["tokens_per_s"] for record in records]
        drawn = [
            {"svg": bars_svg(labels, passes, "tokens per target pass"), "caption": "Tokens that a target pass brings."},
            {"svg": bars_svg(labels, speeds, "tokens per second"), "caption": "Speed on this machine."},
        ]
    return View(
        columns=COLUMNS,
        lines=tuple(
            Line(label, record.config["method"] is None, _cells(record.metrics, plain))
            for label, record in zip(labels, records, strict=True)
        ),
        pictures=tuple(drawn),
        glossary=GLOSSARY,
    )
