"""Measure and keep the result: run one measurement and write benchmarks/results/THEME-MACHINE-DATE.json.

    python scripts/record_results.py compare    every weight method on ref, all tasks
    python scripts/record_results.py weights    every weight method on ref with seeds, outliers and a second text [FILE]
    python scripts/record_results.py claims     every claim, or those of the systems named; status 3: one does not hold
    python scripts/record_results.py evaluate   all tasks on ref and ref-mini
    python scripts/record_results.py caches     every KV cache at 2 and 4 bits on ref, with outliers too, on two texts
    python scripts/record_results.py kv-decode  decoding with a long context; other libraries where they are installed

Result files are added and not edited; a second run on the same day and machine replaces that day's file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import write_text_atomically
from trimtab.core.run_record import RunRecord

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DOES_NOT_HOLD = 3
COMPARED = (
    ("rtn,gptq", ("--bits", "8")),
    ("rtn,gptq,awq,nf,hqq,vq,loftq,qbb", ("--bits", "2,3,4")),
    ("lq_lora,pv_tuning", ("--bits", "2,3")),
    ("rtn,mergequant,qllm", ("--bits", "4", "--set", "activation_bits=4", "--set", "rtn.group_size=-1")),
)
"""Methods and options of the rows of `trimtab compare`; each run has the uncompressed model as its first row."""
TEXT_SIZE = ("--sequences", "32", "--length", "512")
_W4A4 = {"bits": 4, "activation_bits": 4}
SURVEYED: dict[str, list[dict[str, Any]]] = {
    **{name: [{"bits": bits} for bits in (2, 3, 4)] for name in ("rtn", "gptq", "awq", "nf", "hqq", "vq", "loftq")},
    "mergequant": [_W4A4],
}
SURVEYED["rtn"] = [*SURVEYED["rtn"], {**_W4A4, "group_size": -1}]
SURVEYED_ONCE: dict[str, list[dict[str, Any]]] = {
    "lq_lora": [{"bits": 2}, {"bits": 3}],
    "qbb": [{"bits": 2}, {"bits": 3}, {"bits": 4}],
    "pv_tuning": [{"bits": 2}, {"bits": 3}],
    "qllm": [{**_W4A4, "epochs": 3}],
}
"""Methods that train take one seed."""


def trimtab(*arguments: str, accept: Sequence[int] = (0,)) -> tuple[Any, int]:
    """The JSON document that a command writes last, and its exit status."""
    done = subprocess.run([sys.executable, "-m", "trimtab", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode not in accept:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


def compare() -> tuple[dict[str, Any], int]:
    """All methods of the weights room on `ref`."""
    records: list[dict[str, Any]] = []
    for number, (methods, options) in enumerate(COMPARED):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "comparison")
            found, status = trimtab("compare", "ref", "--methods", methods, *options, *TEXT_SIZE, "-o", out, "--json")
        if status:
            return {}, status
        records += found if number == 0 else found[1:]
    for record in records:
        record["metrics"].pop("samples", None)
    return {"records": records}, 0


def weights(second_text: str | None = None) -> tuple[dict[str, Any], int]:
    """All methods of the weights room on `ref`: seeds, outlier channels, a second text (such as WikiText-2's test)."""
    from trimtab.evaluation.weights_survey import survey

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    text = None if second_text is None else Path(second_text)
    document: dict[str, Any] = {"second_text": None if text is None else text.name}
    for surveyed, seeds in ((SURVEYED, (0, 1, 2)), (SURVEYED_ONCE, (0,))):
        settings = [(name, options) for name, own in surveyed.items() for options in own]
        found = survey(settings, second_text=text, seeds=seeds, tell=tell)
        document = {**found, **document, "entries": [*document.get("entries", []), *found["entries"]]}
    return document, 0


def claims(*systems: str) -> tuple[dict[str, Any], int]:
    """All claims; or those of some systems, the others' verdicts being kept from the newest file."""
    verdicts, status = trimtab("claims", *systems, "--json", accept=(0, DOES_NOT_HOLD))
    if systems:
        newest = max(RESULTS.glob("claims-*.json"), key=lambda file: file.stem[-10:])
        kept = json.loads(newest.read_text(encoding="utf-8"))["verdicts"]
        verdicts += [verdict for verdict in kept if verdict["system"] not in {new["system"] for new in verdicts}]
    return {"verdicts": sorted(verdicts, key=lambda verdict: str(verdict["system"]))}, status


def evaluate() -> tuple[dict[str, Any], int]:
    """All tasks on both reference models."""
    return {"models": {name: trimtab("evaluate", name, "--json")[0] for name in ("ref", "ref-mini")}}, 0


def caches() -> tuple[dict[str, Any], int]:
    """All methods of the cache room on `ref`."""
    from trimtab.evaluation.caches.survey import survey

    return survey("ref", tell=lambda line: print(line, file=sys.stderr, flush=True)), 0


LONG_SYSTEMS = "trimtab/kivi-4,trimtab/kivi-2,transformers/dynamic-bf16,llama.cpp/q8_0"


def kv_decode() -> tuple[dict[str, Any], int]:
    """trimtab's caches and other libraries' at 8,192 tokens; at 32,768 those that can be compared in minutes."""
    settings = (("8192", ()), ("32768", ("--systems", LONG_SYSTEMS, "--steps", "16")))
    commands, entries, worst = [], [], 0
    for context, options in settings:
        command = ("bench", "kv-decode", "--context", context, "--seed", "0", *options, "--json")
        found, status = trimtab(*command)
        commands.append(" ".join(("trimtab", *command)))
        entries += found
        worst = max(worst, status)
    return {"command": "; ".join(commands), "seed": 0, "entries": entries}, worst


THEMES: dict[str, Callable[..., tuple[dict[str, Any], int]]] = {
    "compare": compare,
    "weights": weights,
    "claims": claims,
    "caches": caches,
    "evaluate": evaluate,
    "kv-decode": kv_decode,
}


TAKES_ARGUMENTS = ("claims", "weights")


def machine_name(machine: dict[str, Any]) -> str:
    """Processor and number of cores as part of a file name: `amd-epyc-2-cores`, as the kernel benchmark has it."""
    processor = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{processor}-{machine['cores']}-cores"


def main(arguments: Sequence[str]) -> int:
    """Measure one theme and write its file."""
    if not arguments or arguments[0] not in THEMES or (len(arguments) > 1 and arguments[0] not in TAKES_ARGUMENTS):
        print(f"usage: python scripts/record_results.py {'|'.join(THEMES)} [SYSTEM ...|FILE]", file=sys.stderr)
        return 2
    record = RunRecord(command=arguments[0])
    with record.timed("total"):
        measured, status = THEMES[arguments[0]](*arguments[1:])
    document = {
        "started": record.started,
        "seconds": record.seconds["total"],
        "machine": record.machine,
        "versions": record.versions,
        **measured,
    }
    path = RESULTS / f"{arguments[0]}-{machine_name(record.machine)}-{record.started[:10]}.json"
    write_text_atomically(path, json.dumps(document, indent=1) + "\n")
    print(path)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
