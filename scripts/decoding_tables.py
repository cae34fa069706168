"""Tables of the decoding room's results: columns, rows and a note, for results_tables.py to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.app.report import text
from trimtab.app.report.rows import Interval

Document = Mapping[str, Any]
Table = tuple[Sequence[str], list[list[str]], str]


def acceptance_table(document: Document, method: str | None) -> Table:
    """Tokens per forward pass of the target by number of sequences and depth; of a method, with chains beside it."""
    entries = [{**e, "system": _with_rule(e)} for e in document["entries"]]
    entries = [e for e in entries if method in (None, e["method"]) or e["system"] == "speculative token"]
    depths = sorted({e["depth"] for e in entries})
    rows = []
    for system, sequences in sorted({(e["system"], e["sequences"]) for e in entries}, key=lambda key: (key[1], key[0])):
        found = {e["depth"]: e for e in entries if (e["system"], e["sequences"]) == (system, sequences)}
        tokens = [text.interval(Interval.of(found[depth]["tokens_per_target_forward"])) for depth in depths]
        read = [f"{found[depth]['nodes_per_forward']:.1f} read" for depth in depths]
        rows.append([system, str(sequences), *map(", ".join, zip(tokens, read, strict=True))])
    columns = ["method", "sequences", *(f"depth {depth}" for depth in depths)]
    note = (
        f"Tokens per forward pass of {document['target']} with {document['draft']} as its draft, and tokens that it "
        f"reads in one; {document['texts']} beginnings of held-out prose, {document['new_tokens']} new tokens each, "
        f"temperature {document['temperature']:g}. Brackets hold 95 % intervals."
    )
    return columns, rows, note


def _with_rule(entry: Mapping[str, Any]) -> str:
    rule = entry["options"].get("rule")
    return f"{entry['method']} {rule}" if rule else str(entry["method"])


def decoding_table(document: Document, method: str | None) -> Table:
    """Speed of each way to decode that ran; of a method, with the systems that are not trimtab's beside it."""
    entries = [e for e in document["entries"] if e.get("tokens_per_s_median") is not None]
    rows = []
    for depth in sorted({e["setting"]["depth"] for e in entries}):
        own = [e for e in entries if e["setting"]["depth"] == depth]
        plain = next(e["tokens_per_s_median"] for e in own if e["system"] == "transformers/plain")
        assisted = next(e["tokens_per_s_median"] for e in own if e["system"] == "transformers/assisted")
        for e in sorted(own, key=lambda e: -e["tokens_per_s_median"]):
            kind = e["system"].removeprefix("trimtab/")
            if method is not None and kind != e["system"] and kind != "plain" and not kind.startswith(method):
                continue
            speed = e["tokens_per_s_median"]
            rows.append(
                [
                    str(depth),
                    e["system"],
                    f"{speed:.3g}",
                    f"{speed / plain:.2f}",
                    f"{speed / assisted:.2f}",
                    f"{e['tokens_per_target_forward']:.2f}",
                    " ".join(map(str, e["accepted_by_depth"] or [])) or "–",
                    f"{e['same_text']:.0%}",
                ]
            )
    columns = ["depth", "system", "tokens per second", "times plain", "times assisted", "tokens per target forward"]
    columns += ["accepted by depth", "same text"]
    setting = document["entries"][0]["setting"]
    note = (
        f"Medians over {setting['prompts']} prompts of held-out prose of {setting['prompt']} tokens, "
        f"{setting['steps']} new ones, greedily, batch 1. Target: ref, widened by {setting['million_weights']} million "
        "weights that change no output, in bfloat16; draft: ref-mini unless the name says another. Same text: share of "
        "the tokens up to the first that is not plain decoding's; near ties fall otherwise when several tokens are "
        "read at once."
    )
    return columns, rows, note


def controlled_table(document: Document, _: str | None) -> Table:
    """Time under the controller over plain decoding's: a row for each target and method, a column for each prompts."""
    entries = document["entries"]
    sets = list(dict.fromkeys(e["prompts"] for e in entries))
    rows = []
    for target, method in dict.fromkeys((e["target"], e["method"]) for e in entries):
        found = {e["prompts"]: e for e in entries if (e["target"], e["method"]) == (target, method)}
        cells = [
            f"{found[s]['seconds_ratio']:.3f} ({found[s]['share_of_rounds_with_draft']:.0%} drafted)" for s in sets
        ]
        rows.append([target, method, *cells])
    note = (
        f"Seconds over those of plain decoding, sums over {document['texts'][0]} texts (of the widened model "
        f"{document['texts'][1]}) of {document['new_tokens']} new tokens each, the two in turn, and the share of "
        "rounds with a draft. On this machine two runs of plain decoding differ by up to 5 to 8 %."
    )
    return ["target", "draft", *sets], rows, note
