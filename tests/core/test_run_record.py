"""Run records, the ledger's figures, progress."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.core.ledger import Ledger, LedgerEntry
from trimtab.core.progress import progress
from trimtab.core.run_record import RunRecord


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = RunRecord("compress", config={"bits": 4}, seed=3)
    with record.timed("compress"):
        pass
    record.save(tmp_path / "run.json")
    assert RunRecord.from_dict(json.loads((tmp_path / "run.json").read_text())) == record
    assert record.seconds["compress"] >= 0
    assert record.versions["torch"].startswith("2.")
    assert record.machine["cores"] >= 1


def test_the_time_of_a_failed_block_is_kept() -> None:
    record = RunRecord("x")
    with pytest.raises(ValueError, match="no"), record.timed("step"):
        raise ValueError("no")
    assert "step" in record.seconds


def ledger(**changes: int) -> Ledger:
    figures = {
        "bytes_at_rest": 50, "resident_bytes": 60, "bytes_read_per_token": 40, "kv_bytes_per_token": 8,
        "macs_per_token": 100, "baseline_bytes": 200, "compressed_weights": 80, "compressed_bytes": 40,
    }  # fmt: skip
    return Ledger(**(figures | changes), entries=(LedgerEntry("a", "codes", 40),))


def test_ledger_fractions() -> None:
    assert ledger().keep_fraction == 0.25
    assert ledger().bits_per_weight == 4.0
    assert ledger(compressed_weights=0).bits_per_weight is None
    assert "entries" not in ledger().to_dict()
    assert ledger().to_dict(entries=True)["entries"] == [{"module": "a", "role": "codes", "nbytes": 40}]


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 3) as advance:
        for _ in range(3):
            advance("")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
