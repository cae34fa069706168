"""Draw the tables of results in README.md and docs/ from the committed result files.

    python scripts/results_tables.py            rewrite the tables
    python scripts/results_tables.py --check    exit with status 1 if a table is not what its result file says

A table stands between `<!-- results: THEME [CHOICE] -->` and `<!-- end results -->`. It is drawn from the newest file
`benchmarks/results/THEME-MACHINE-DATE.json`, which `make results`, `make claims` and `make bench` write. The choice is
a method, `3-bit` for methods at that width, a group of the pruning survey, or `batch-1` for kernels.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from decoding_tables import acceptance_table, controlled_table, decoding_table
from survey_tables import pruning_peers_table, pruning_table, weights_peers_table, weights_table

from trimtab.app.report import text
from trimtab.app.report.cache_view import cache_row, cells_of, columns_of
from trimtab.app.report.rows import Interval, Row, main_metrics, row_of
from trimtab.core.run_record import RunRecord

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- results: ([\w-]+)(?: ([\w-]+))? -->\n).*?(<!-- end results -->)", re.DOTALL)

Document = Mapping[str, Any]


def documents_with_tables() -> list[Path]:
    """Pages that may hold tables; the skeleton of a method's page is not one of them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if not page.name.startswith("_")]


def newest(theme: str) -> Document | None:
    """The newest committed result of a theme, by the date in its name, with the date and its path added."""
    longer = tuple(f"{other}-" for other in TABLES if other.startswith(f"{theme}-"))
    files = [file for file in RESULTS.glob(f"{theme}-*.json") if not file.name.startswith(longer)]
    files.sort(key=lambda file: file.stem[-10:])
    if not files:
        return None
    document: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return {**document, "date": files[-1].stem[-10:], "file": files[-1].relative_to(ROOT).as_posix()}


def compare_table(document: Document, method: str | None) -> str:
    """Rows of `trimtab compare`: the uncompressed model first; with `method`, only that method's."""
    rows = [row_of(RunRecord.from_dict(record)) for record in document["records"]]
    chosen = [row for row in rows if row.baseline or method in (None, row.method)]
    if all(row.baseline for row in chosen):
        return ""
    tasks = _tasks_to_show(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row.label,
        "bytes at rest": lambda row: text.size(row.bytes_at_rest),
        "kept": lambda row: f"{row.keep_fraction:.2f}",
        "bits per weight": lambda row: text.NOTHING if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        "bits per byte of prose": lambda row: text.interval(row.bits_per_byte),
        "KL to the original (nats per token)": lambda row: text.interval(row.kl),
        **{task: _task_cell(key) for task, key in tasks.items()},
        "tokens/s": lambda row: (
            text.NOTHING if row.tokens_per_second is None else text.number(row.tokens_per_second.value)
        ),
        "time to compress": lambda row: text.seconds(row.compress_seconds),
    }
    table = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in chosen])
    return f"{table}\n\n{source_line(document, 'Brackets hold 95 % intervals.')}"


def _task_cell(key: tuple[str, str]) -> Callable[[Row], str]:
    return lambda row: text.interval(row.tasks.get(key))


def _tasks_to_show(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """The main metric of the tasks that the table has room for."""
    main = dict(main_metrics(rows))
    return {task: (task, main[task]) for task in ("recall", "facts", "format") if task in main}


def claims_table(document: Document, method: str | None) -> str:
    """Verdicts: what the paper says, what was measured, the baseline beside it, whether it holds."""
    verdicts = [v for v in document["verdicts"] if method in (None, v["system"])]
    if not verdicts:
        return ""
    columns = ["claim", "measured", "baseline", "verdict"]
    rows = [
        [
            v["claim"] if method else f"**{v['system']}**: {v['claim']}",
            _figures(v["measured"]),
            _figures(v["baseline"]),
            "holds" if v["holds"] else "does not hold here",
        ]
        for v in verdicts
    ]
    return f"{markdown(columns, rows)}\n\n{source_line(document)}"


def _figures(numbers: Mapping[str, float]) -> str:
    shown = {name: text.size(v) if name.startswith("bytes") else text.number(v) for name, v in numbers.items()}
    return "<br>".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def grid_matmul_table(document: Document, batch: str | None) -> str:
    """The product with packed weights, beside torch's on the same shape; `batch-1` shows that batch only."""
    entries = document["entries"]
    if batch:
        entries = [e for e in entries if f"{batch.replace('-', ' ')}," in f"{e['setting']},"]
    torch_ms = {e["setting"]: e["decode_ms_median"] for e in entries if "torch" in e["system"]}
    columns = ["product", "system", "ms", "times torch's speed", "GB/s of weights", "share of the memory bandwidth"]
    rows = [
        [
            e["setting"],
            e["system"],
            text.number(e["decode_ms_median"]),
            text.number(torch_ms[e["setting"]] / e["decode_ms_median"]) if e["setting"] in torch_ms else text.NOTHING,
            text.number(e["read_gbps_median"]),
            f"{e['bandwidth_share']:.0%}",
        ]
        for e in entries
    ]
    return f"{markdown(columns, rows)}\n\n{source_line(document, 'Medians.')}" if rows else ""


def caches_table(document: Document, method: str | None) -> str:
    """Rows of the cache room on `ref`, plain; then KL under outliers and on the calibration text."""
    entries = [e for e in document["entries"] if method in (None, e["method"])]
    if not entries:
        return ""
    rows = [cache_row(document["baseline"]["plain"], "no compression", None)]
    rows += [cache_row(e["conditions"]["plain"], e["label"], e["method"]) for e in entries]
    columns = columns_of(rows)
    shown = [i for i, name in enumerate(columns) if name not in ("cache bytes", "tokens/s")]
    others = [name for name in document["baseline"] if name != "plain"]
    lines = []
    for number, row in enumerate(rows):
        cells = [row.label, *(" ".join(part for part in cell if part) for cell in cells_of(row, rows))]
        extra = [
            text.NOTHING if number == 0 else _kl(entries[number - 1]["conditions"][condition]) for condition in others
        ]
        lines.append([*(cells[i] for i in shown), *extra])
    heads = [*(columns[i] for i in shown), *(f"KL, {condition}" for condition in others)]
    note = "Bits with keys and values in bfloat16, quality in float32. Brackets hold 95 % intervals."
    return f"{markdown(heads, lines)}\n\n{source_line(document, note)}"


def kv_decode_table(document: Document, _: str | None) -> str:
    """Decoding with a long context: each system that ran, the longest context last."""
    entries = [e for e in document["entries"] if e.get("decode_ms_median") is not None]
    plain = {e["context"]: e["decode_ms_median"] for e in entries if e["system"] == "transformers/dynamic-bf16"}
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "context": lambda e: f"{e['context']:,}",
        "system": lambda e: str(e["system"]),
        "ms per token": lambda e: text.number(e["decode_ms_median"]),
        "times DynamicCache's speed": lambda e: (
            text.number(plain[e["context"]] / e["decode_ms_median"]) if e["context"] in plain else text.NOTHING
        ),
        "of which attention, ms": lambda e: text.number(e.get("attention_ms_median")),
        "prefill, s": lambda e: text.number(e.get("prefill_s_median")),
        "cache": lambda e: text.NOTHING if e.get("kv_bytes") is None else text.size(e["kv_bytes"]),
        "peak memory": lambda e: text.NOTHING if e.get("peak_rss_bytes") is None else text.size(e["peak_rss_bytes"]),
    }
    rows = [[cell(entry) for cell in columns.values()] for entry in entries]
    note = "Medians; 4 layers, hidden 1,024, 16 query and 8 KV heads of 64, MLP 2,816, 16-bit weights, batch 1."
    return f"{markdown(list(columns), rows)}\n\n{source_line(document, note)}" if rows else ""


def decode_table(document: Document, beside: str | None) -> str:
    """Decoding with compressed weights: each system that ran, fastest first at each context; `beside` names the one
    whose speed is 1, if it is not torch."""
    entries = [e for e in document["entries"] if e.get("decode_ms_median") is not None]
    one = beside or "torch/"
    plain = {e["context"]: e["decode_ms_median"] for e in entries if e["system"].startswith(one)}
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "context": lambda e: f"{e['context']:,}",
        "system": lambda e: str(e["system"]),
        "ms per token": lambda e: text.number(e["decode_ms_median"]),
        f"times the speed of {one.rstrip('/')}": lambda e: (
            text.number(plain[e["context"]] / e["decode_ms_median"]) if e["context"] in plain else text.NOTHING
        ),
        "prefill of 512, s": lambda e: text.number(e.get("prefill_s_median")),
        "weights": lambda e: text.NOTHING if e.get("weight_bytes") is None else text.size(e["weight_bytes"]),
        "share of the memory bandwidth": lambda e: (
            text.NOTHING if e.get("bandwidth_share") is None else f"{e['bandwidth_share']:.0%}"
        ),
    }
    ordered = sorted(entries, key=lambda e: (e["context"], e["decode_ms_median"]))
    rows = [[cell(entry) for cell in columns.values()] for entry in ordered]
    note = (
        "Medians, two threads; a random Llama of 369 M weights: 8 layers, hidden 2,048, 32 query and 4 KV heads of 64, "
        "MLP 5,632, batch 1."
    )
    return f"{markdown(list(columns), rows)}\n\n{source_line(document, note)}" if rows else ""


def _kl(figures: Mapping[str, Any]) -> str:
    return text.interval(Interval.of(figures["divergence"]["kl_nats_per_token"]))


def evaluate_table(document: Document, _: str | None) -> str:
    """Task metrics of the reference models, one column per model."""
    models = document["models"]
    tasks = next(iter(models.values()))["tasks"]
    rows = [
        [
            task,
            metric.replace("_", " "),
            *(text.interval(Interval.of(m["tasks"][task][metric])) for m in models.values()),
        ]
        for task, metrics in tasks.items()
        for metric in metrics
    ]
    return f"{markdown(['task', 'metric', *models], rows)}\n\n{source_line(document, 'Brackets hold 95 % intervals.')}"


TABLES: dict[str, Callable[[Document, str | None], str]] = {
    "compare": compare_table,
    "weights": lambda document, method: finished(document, *weights_table(document, method)),
    "weights-peers": lambda document, method: finished(document, *weights_peers_table(document, method)),
    "pruning": lambda document, choice: finished(document, *pruning_table(document, choice)),
    "pruning-peers": lambda document, choice: finished(document, *pruning_peers_table(document, choice)),
    "claims": claims_table,
    "caches": caches_table,
    "evaluate": evaluate_table,
    "grid-matmul": grid_matmul_table,
    "kv-decode": kv_decode_table,
    "decode": decode_table,
    "decode-pruned": lambda document, _: decode_table(document, "trimtab/dense"),
    "acceptance": lambda document, method: finished(document, *acceptance_table(document, method)),
    "decoding": lambda document, method: finished(document, *decoding_table(document, method)),
    "controlled-drafts": lambda document, method: finished(document, *controlled_table(document, method)),
}


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right unless they hold sentences."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finished(document: Document, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """A table with its source; nothing without rows."""
    return f"{markdown(columns, rows)}\n\n{source_line(document, note)}" if rows else ""


def source_line(document: Document, note: str = "") -> str:
    """Where the numbers come from."""
    machine, versions = document["machine"], document["versions"]
    place = f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, {document['date']}"
    return f"{note} {place}; `{document['file']}`.".strip()


def drawn(page: str) -> str:
    """The page with its tables drawn anew."""

    def draw(match: re.Match[str]) -> str:
        opening, theme, method, closing = match.groups()
        if theme not in TABLES:
            raise KeyError(f"no table '{theme}'; known: {', '.join(TABLES)}")
        document = newest(theme)
        table = TABLES[theme](document, method) if document else ""
        return f"{opening}\n{table or 'No results are committed yet.'}\n\n{closing}"

    return MARKED.sub(draw, page)


def main(arguments: Sequence[str]) -> int:
    """Draw, or with --check compare."""
    stale = []
    for path in documents_with_tables():
        before = path.read_text(encoding="utf-8")
        after = drawn(before)
        if after != before:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    print("\n".join(stale) if stale else "all tables are as the result files say")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
