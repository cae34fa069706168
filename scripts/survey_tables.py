"""Tables of what was compressed in many ways: columns, rows and a note, for results_tables.py to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.app.report import text
from trimtab.app.report.rows import Interval

Document = Mapping[str, Any]
Entry = Mapping[str, Any]
Cells = Mapping[str, Callable[[Entry], str]]
Table = tuple[Sequence[str], list[list[str]], str]

NOTE = "KL to the original in nats per token: mean over seeds, and their range; other columns: first seed."


def weights_table(document: Document, method: str | None) -> Table:
    """Rows of the weights survey by size; `method` is that method's rows, or `3-bit` those of that width."""
    entries = [e for e in document["entries"] if method in (None, e["method"]) or f" {method}" in e["label"]]
    entries = sorted(entries, key=lambda e: float(_first(e)["bytes_at_rest"]))
    sizes: Cells = {
        "bits per weight": lambda e: f"{_first(e)['bits_per_weight']:.2f}",
        "bytes at rest": lambda e: text.size(_first(e)["bytes_at_rest"]),
    }
    return *_rows(document, entries, sizes, {}), NOTE


def pruning_table(document: Document, choice: str | None) -> Table:
    """Rows of the pruning survey; `choice` is a group of it, or a method."""
    whole = document["uncompressed_ledger"]

    def of_whole(name: str) -> Callable[[Entry], str]:
        return lambda e: f"{_first(e)[name] / whole[name]:.1%}"

    sizes: Cells = {
        "bytes at rest": of_whole("bytes_at_rest"),
        "bytes read per token": of_whole("bytes_read_per_token"),
        "time": lambda e: text.seconds(_first(e)["seconds"]),
    }
    entries = [e for e in document["entries"] if choice in (None, e["group"], e["method"])]
    note = f"{NOTE} Bytes are of the whole model, in bfloat16; recovery is the mean over tasks of the accuracy kept."
    return *_rows(document, entries, sizes, {"recovery": lambda e: _recovery(document, e)}), note


def weights_peers_table(document: Document, _: str | None) -> Table:
    """KL of each library's quantizer, best first at each number of bits; what did not run, with the reason."""
    note = "Codes in groups of 64 and the same text for all; KL to the original in nats per token on held-out prose"
    return *_beside(document, "bits"), f"{note}, 95 % intervals; one core each."


def pruning_peers_table(document: Document, _: str | None) -> Table:
    """KL of each library's pruning, best first at each sparsity."""
    note = (
        "The same text for all; KL to the original in nats per token on held-out prose, 95 % intervals; one core each."
    )
    return *_beside(document, "sparsity"), note


def _rows(
    document: Document, entries: Sequence[Entry], sizes: Cells, quality: Cells
) -> tuple[list[str], list[list[str]]]:
    """Method, sizes, KL in each condition on each text, tasks, and what else is said of quality."""
    tasks = list(document["uncompressed"])
    texts = {"prose": "prose"} | ({"second_text": str(document["second_text"])} if document.get("second_text") else {})
    places = [(condition, key) for condition in ("plain", "outliers") for key in texts]
    columns = ["method", *sizes]
    columns += [f"KL, {texts[key]}{'' if condition == 'plain' else ', outliers'}" for condition, key in places]
    columns += ["bits per byte of prose" if task == "prose" else task for task in tasks]
    columns += quality
    whole = ["uncompressed", *[text.NOTHING] * (len(sizes) + len(places))]
    whole += [text.number(document["uncompressed"][task]["value"]) for task in tasks]
    rows = [whole + [text.NOTHING] * len(quality)]
    for entry in entries:
        cells = [entry["label"], *(cell(entry) for cell in sizes.values())]
        cells += [_over_seeds(entry["runs"], *place) for place in places]
        cells += [text.number(entry["tasks"][task]["value"]) for task in tasks]
        rows.append(cells + [cell(entry) for cell in quality.values()])
    return columns, rows if entries else []


def _first(entry: Entry) -> Mapping[str, Any]:
    run: Mapping[str, Any] = entry["runs"][0]
    return run


def _over_seeds(runs: Sequence[Mapping[str, Any]], condition: str, key: str) -> str:
    found = [r["texts"][key]["kl_nats_per_token"]["value"] for r in runs if r["condition"] == condition]
    if not found:
        return text.NOTHING
    mean = text.number(sum(found) / len(found))
    return mean if min(found) == max(found) else f"{mean} ({text.number(min(found))} to {text.number(max(found))})"


def _recovery(document: Document, entry: Entry) -> str:
    whole = {task: found["value"] for task, found in document["uncompressed"].items() if task != "prose"}
    return f"{sum(entry['tasks'][task]['value'] / value for task, value in whole.items()) / len(whole):.0%}"


def _beside(document: Document, amount: str) -> tuple[list[str], list[list[str]]]:
    """Best first for each `amount`."""
    entries = sorted(
        document["entries"],
        key=lambda e: (e[amount], e["prose"]["kl_nats_per_token"]["value"] if "prose" in e else 1e9),
    )
    cells: Cells = {
        amount: lambda e: str(e[amount]),
        "system": lambda e: str(e["system"]),
        "bits per weight": lambda e: f"{e['bits_per_weight']:.2f}" if "prose" in e else text.NOTHING,
        "KL": lambda e: (
            text.interval(Interval.of(e["prose"]["kl_nats_per_token"])) if "prose" in e else str(e["error"])
        ),
        "time": lambda e: text.seconds(e["seconds"]) if "prose" in e else text.NOTHING,
    }
    if any("peak_rss_bytes" in e for e in entries):
        cells = {
            **cells,
            "peak memory": lambda e: text.size(e["peak_rss_bytes"]) if "peak_rss_bytes" in e else text.NOTHING,
        }
    return list(cells), [[cell(entry) for cell in cells.values()] for entry in entries]
