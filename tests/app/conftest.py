"""Stand-ins that keep these tests small: run records with made-up figures, and the command line in process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from trimtab.core.run_record import RunRecord


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on the last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process: `cli("list", "--json")`."""
    from trimtab.app.cli import main

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        captured = capsys.readouterr()
        return Ran(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run a command that must be refused: status 2, one message on standard error, no traceback, no output."""

    def run(*arguments: str, names: Sequence[str]) -> Ran:
        ran = cli(*arguments)
        assert ran.status == 2, ran
        assert ran.out == ""
        assert "Traceback" not in ran.err
        flat = " ".join(ran.err.replace("│", " ").split())
        for name in names:
            assert name in flat
        return ran

    return run


def record(label: str, method: str | None, bits: int | None, size: int, kl: float, bpb: float) -> RunRecord:
    def interval(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    return RunRecord(
        command="compare",
        config={"label": label, "method": method, "bits": bits, "model": "ref", "options": {}},
        seconds={} if method is None else {"compress": 1.5 + (bits or 0)},
        ledger={
            "bytes_at_rest": size,
            "keep_fraction": size / 14e6,
            "bits_per_weight": None if bits is None else bits + 0.3,
        },
        metrics={
            "tasks": {
                "prose": {"bits_per_byte": interval(bpb, 0.02), "perplexity": interval(20 * bpb, 1.0)},
                "recall": {"exact_match": interval(0.9 - kl, 0.05)},
            },
            "fidelity": {} if method is None else {"kl_nats_per_token": interval(kl, kl / 10)},
            "speed": {"decode_tokens_per_second_median": 812.5},
        },
        changed=[{"name": "model.layers.0.mlp.up_proj"}] if method else [],
    )


@pytest.fixture
def records() -> list[RunRecord]:
    rows: list[tuple[Any, ...]] = [("uncompressed", None, None, 13_800_000, 0.0, 1.20)]
    for bits, size in ((4, 5_300_000), (3, 4_600_000), (2, 3_900_000)):
        rows.append((f"rtn {bits}-bit", "rtn", bits, size, 0.8 / bits**3 * 4, 1.2 + 1.5 / bits**2))
        rows.append((f"gptq {bits}-bit", "gptq", bits, size, 0.4 / bits**3 * 4, 1.2 + 0.9 / bits**2))
    return [record(*row) for row in rows]
