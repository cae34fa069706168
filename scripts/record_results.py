"""Measure and keep the result: run one measurement and write benchmarks/results/THEME-MACHINE-DATE.json.

    python scripts/record_results.py compare    rtn and gptq at 2, 3, 4 and 8 bits on ref, all tasks
    python scripts/record_results.py weights    weight methods on ref, with outliers too, two texts [FILE [METHOD]]
    python scripts/record_results.py weights-peers    other libraries' quantizers and ours, where they are installed
    python scripts/record_results.py pruning    methods that prune, slice or skip, likewise [FILE [METHOD]]
    python scripts/record_results.py pruning-peers    llmcompressor's pruning and ours, where it is installed
    python scripts/record_results.py claims     every claim, or those of the systems named; status 3: one does not hold
    python scripts/record_results.py evaluate   all tasks on ref and ref-mini
    python scripts/record_results.py caches     every KV cache at 2 and 4 bits on ref, with outliers too, on two texts
    python scripts/record_results.py kv-decode  decoding with a long context; other libraries where they are installed
    python scripts/record_results.py decode     decoding with compressed weights, likewise
    python scripts/record_results.py decode-pruned    decoding with pruned, sliced and skipped weights beside dense ones
    python scripts/record_results.py acceptance tokens per forward pass of ref for shapes of drafts by ref-mini
    python scripts/record_results.py decoding   drafts beside plain decoding and transformers' assisted generation
    python scripts/record_results.py controlled-drafts  what drafts cost under the controller where they do not pay
    python scripts/record_results.py linear     single layers, likewise
    python scripts/record_results.py compress-time  time and memory of compressing, likewise

Result files are added and not edited; a second run on the same day and machine replaces that day's file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.files import write_text_atomically
from trimtab.core.run_record import RunRecord

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DOES_NOT_HOLD = 3
METHODS, BITS = "rtn,gptq", "2,3,4,8"
_W4A4 = {"bits": 4, "activation_bits": 4}
_EACH = [{"bits": bits} for bits in (2, 3, 4)]
_Settings = dict[str, list[dict[str, Any]]]
_SEVERAL_SEEDS: _Settings = dict.fromkeys(("rtn", "gptq", "nf", "hqq", "loftq"), _EACH)
_ONE_SEED: _Settings = {
    "awq": _EACH,
    "vq": _EACH[:1],
    "lq_lora": [{"budget_bits": 2.5}, {"budget_bits": 3.5}],
    "qbb": _EACH,
    "pv_tuning": _EACH[:2],
}
_ROUNDED_INPUTS: _Settings = {
    "rtn": [{**_W4A4, "group_size": -1}],
    "mergequant": [_W4A4],
    "qllm": [{**_W4A4, "epochs": 3}],
}
SURVEYED: Sequence[tuple[_Settings, Sequence[tuple[str, int]]]] = (
    (_SEVERAL_SEEDS, (("plain", 0), ("plain", 1), ("plain", 2), ("outliers", 0))),
    (_ONE_SEED, (("plain", 0),)),
    (_ROUNDED_INPUTS, (("plain", 0), ("outliers", 0))),
)
"""Methods with their options, and how often: those that take a minute or more run once."""


def trimtab(*arguments: str, accept: Sequence[int] = (0,)) -> tuple[Any, int]:
    """The JSON document that a command writes last, and its exit status."""
    done = subprocess.run([sys.executable, "-m", "trimtab", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode not in accept:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


def compare() -> tuple[dict[str, Any], int]:
    """What `trimtab compare` says of the two baselines on `ref`."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "comparison")
        records, status = trimtab("compare", "ref", "--methods", METHODS, "--bits", BITS, "-o", out, "--json")
    for record in records:
        record["metrics"].pop("samples", None)
    return {"records": records}, status


def weights(second_text: str | None = None, *methods: str) -> tuple[dict[str, Any], int]:
    """All methods of the weights room on `ref`: seeds, outlier channels, a second text (such as WikiText-2's test); or
    some methods, the others' entries being kept from the newest file."""
    from trimtab.evaluation.weights_survey import survey

    text, document = _second_text(second_text)
    entries = _of_others("weights", methods)
    for surveyed, runs in SURVEYED:
        settings = [(n, options) for n, own in surveyed.items() for options in own if not methods or n in methods]
        if settings:
            found = survey(settings, runs=runs, second_text=text, tell=_tell)
            document = {**found, **document}
            entries += found["entries"]
    return {**document, "entries": entries}, 0


def pruning(second_text: str | None = None, *methods: str) -> tuple[dict[str, Any], int]:
    """Pruning, slicing and sparse inputs on `ref`, as `weights`."""
    from trimtab.evaluation.pruning_survey import survey

    text, document = _second_text(second_text)
    found = survey(methods, second_text=text, tell=_tell)
    return {**found, **document, "entries": _of_others("pruning", methods) + found["entries"]}, 0


def _second_text(name: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file, and how a document names it."""
    text = None if name is None else Path(name)
    return text, {"second_text": None if text is None else "/".join(text.parts[-2:])}


def _of_others(theme: str, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of the newest file that are of none of these methods; none if all are measured."""
    return [entry for entry in newest(theme)["entries"] if entry["method"] not in methods] if methods else []


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def newest(theme: str) -> dict[str, Any]:
    """The newest file of a theme."""
    longer = tuple(f"{other}-" for other in THEMES if other.startswith(f"{theme}-"))
    files = [file for file in RESULTS.glob(f"{theme}-*.json") if not file.name.startswith(longer)]
    file = max(files, key=lambda file: file.stem[-10:])
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def claims(*systems: str) -> tuple[dict[str, Any], int]:
    """All claims; or those of some systems, the others' verdicts being kept from the newest file."""
    verdicts, status = trimtab("claims", *systems, "--json", accept=(0, DOES_NOT_HOLD))
    if systems:
        measured = {verdict["system"] for verdict in verdicts}
        verdicts += [verdict for verdict in newest("claims")["verdicts"] if verdict["system"] not in measured]
    return {"verdicts": sorted(verdicts, key=lambda verdict: str(verdict["system"]))}, status


def evaluate() -> tuple[dict[str, Any], int]:
    """All tasks on both reference models."""
    return {"models": {name: trimtab("evaluate", name, "--json")[0] for name in ("ref", "ref-mini")}}, 0


def caches() -> tuple[dict[str, Any], int]:
    """All methods of the cache room on `ref`."""
    from trimtab.evaluation.caches.survey import survey

    return survey("ref", tell=_tell), 0


def acceptance() -> tuple[dict[str, Any], int]:
    """Tokens per forward pass of `ref` over the number of drafted sequences and their depth."""
    from trimtab.evaluation.acceptance import curve

    return curve(_tell), 0


def decoding() -> tuple[dict[str, Any], int]:
    """Ways to draft, plain decoding and transformers' assisted generation, at two depths."""
    return benchmarks(("decoding", "--depth", "5"), ("decoding", "--depth", "3"))


def controlled_drafts() -> tuple[dict[str, Any], int]:
    """Drafting under the controller over plain decoding, good and useless drafts."""
    from trimtab.evaluation.controlled_drafts import survey

    return survey(_tell), 0


def weights_peers() -> tuple[dict[str, Any], int]:
    """Other libraries' quantizers and ours at 2 and 3 bits on `ref`; run it where they are installed."""
    from trimtab.evaluation.weights_peers import measure

    return _beside(measure(), "bits")


def pruning_peers() -> tuple[dict[str, Any], int]:
    """llmcompressor's pruning and ours at 50 % and 2:4 on `ref`; run it where it is installed."""
    from trimtab.evaluation.pruning_peers import measure

    return _beside(measure(), "sparsity")


def _beside(measured: Iterable[dict[str, Any]], amount: str) -> tuple[dict[str, Any], int]:
    entries = []
    for entry in measured:
        _tell(f"{entry['system']} {entry[amount]} {entry.get('error', '')}")
        entries.append(entry)
    return {"entries": entries}, 0


DECODING = ",".join(
    [f"trimtab/{name}" for name in ("grid-4", "grid-2", "grid-4-128", "nf-4", "grid-4+rank-16", "grid-4+outliers-0.5")]
    + ["torch/bf16", "quanto/int4", "bitsandbytes/nf4", "torchao/int4", "hqq/4"]
    + [f"llama.cpp/{name}" for name in ("f16", "q8_0", "q4_0", "q2_k")]
)
LONG_SYSTEMS = "trimtab/kivi-4,trimtab/kivi-2,transformers/dynamic-bf16,llama.cpp/q8_0"


def kv_decode() -> tuple[dict[str, Any], int]:
    """trimtab's caches and other libraries' at 8,192 tokens; at 32,768 those that can be compared in minutes."""
    return benchmarks(
        ("kv-decode", "--context", "8192"),
        ("kv-decode", "--context", "32768", "--systems", LONG_SYSTEMS, "--steps", "16"),
    )


def decode() -> tuple[dict[str, Any], int]:
    """Compressed weights with a short context; then 4 bits with trimtab's 4-bit cache at 8,192 tokens."""
    return benchmarks(
        ("decode", "--systems", DECODING),
        (
            "decode",
            "--cache",
            "kivi-4",
            "--context",
            "8192",
            "--steps",
            "16",
            "--systems",
            "trimtab/grid-4,llama.cpp",
        ),
    )


def decode_pruned() -> tuple[dict[str, Any], int]:
    """Less to read per token beside the same model whole, and torch."""
    return benchmarks(("decode", "--systems", "pruned,torch/bf16"))


def linear() -> tuple[dict[str, Any], int]:
    """Single layers of every representation."""
    return benchmarks(("linear",))


def compress_time() -> tuple[dict[str, Any], int]:
    """Both models; less text for the large one, whose forward passes would otherwise be most of the time."""
    return benchmarks(("compress", "--model", "ref"), ("compress", "--model", "random", "--sequences", "8"))


def benchmarks(*commands: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The entries of several `trimtab bench` commands, one after the other."""
    whole = [("bench", *command, "--seed", "0", "--json") for command in commands]
    found = [trimtab(*command) for command in whole]
    return {
        "command": "; ".join(" ".join(("trimtab", *command)) for command in whole),
        "seed": 0,
        "entries": [entry for entries, _ in found for entry in entries],
    }, max(status for _, status in found)


THEMES: dict[str, Callable[..., tuple[dict[str, Any], int]]] = {
    "compare": compare,
    "weights": weights,
    "weights-peers": weights_peers,
    "pruning": pruning,
    "pruning-peers": pruning_peers,
    "claims": claims,
    "caches": caches,
    "acceptance": acceptance,
    "decoding": decoding,
    "controlled-drafts": controlled_drafts,
    "evaluate": evaluate,
    "kv-decode": kv_decode,
    "decode": decode,
    "decode-pruned": decode_pruned,
    "linear": linear,
    "compress-time": compress_time,
}


TAKES_ARGUMENTS = ("claims", "weights", "pruning")


def machine_name(machine: dict[str, Any]) -> str:
    """Processor and number of cores as part of a file name: `amd-epyc-2-cores`, as the kernel benchmark has it."""
    processor = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{processor}-{machine['cores']}-cores"


def main(arguments: Sequence[str]) -> int:
    """Measure one theme and write its file."""
    if not arguments or arguments[0] not in THEMES or (len(arguments) > 1 and arguments[0] not in TAKES_ARGUMENTS):
        print(
            f"usage: python scripts/record_results.py {'|'.join(THEMES)} [SYSTEM ...|FILE METHOD ...]", file=sys.stderr
        )
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
