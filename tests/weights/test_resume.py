"""Killed at any point, a run continues: same bytes as one that was never interrupted, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trimtab.core.errors import CheckpointError, OutputError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.random import random_model
from trimtab.weights import _state
from trimtab.weights.gptq import Gptq
from trimtab.weights.rtn import Rtn

from .kill_server import GPTQ, LAYERS, KillServer, run


@pytest.fixture(scope="module")
def server() -> Iterator[KillServer]:
    server = KillServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the server has: sums of floats depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors"))}


def check_kills(server: KillServer, points: list[int], mode: str, tmp_path: Path) -> bool:
    """Kill at each of the points, resume, compare; True if there was a point beyond the end."""
    run(tmp_path / "whole", mode=mode)
    expected = digests(tmp_path / "whole")
    for at in points:
        directory = tmp_path / f"killed-{at}"
        directory.mkdir()
        killed = server.killed(directory, at, mode=mode)
        output = directory / "out"
        if not output.exists():  # else it was killed while it cleaned up
            run(output, mode=mode)
            assert not (directory / "out.partial").exists()
            assert [p.name for p in directory.iterdir()] == ["out"]
        assert digests(output) == expected, at
        shutil.rmtree(directory)
        if not killed:
            return True
    return False


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process, which this platform has not")


@fork
@pytest.mark.parametrize(("mode", "points"), [("sequential", [1, 4, 9, 16, 25, 36]), ("dense", [12, 20])])
def test_killed_and_resumed_gives_the_same_bytes(
    mode: str, points: list[int], server: KillServer, tmp_path: Path
) -> None:
    assert not check_kills(server, points, mode, tmp_path)  # every point was reached


@fork
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "dense"])
def test_killed_at_every_point(mode: str, server: KillServer, tmp_path: Path) -> None:
    assert check_kills(server, list(range(1, 500)), mode, tmp_path)


@fork
def test_killed_again_and_again(server: KillServer, tmp_path: Path) -> None:
    """Each attempt gets a little further on what the ones before it finished."""
    run(tmp_path / "whole")
    attempts = 0
    while not (tmp_path / "out").exists():
        attempts += 1
        server.killed(tmp_path, 8 + 4 * attempts)
        assert attempts < 20
    assert attempts > 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@fork
def test_an_old_result_stays_whole_until_it_is_replaced(server: KillServer, tmp_path: Path) -> None:
    run(tmp_path / "out", method=Rtn(group_size=16))
    old = digests(tmp_path / "out")
    assert server.killed(tmp_path, 30, force=True)
    assert digests(tmp_path / "out") == old
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    run(tmp_path / "out", force=True)
    assert digests(tmp_path / "out") != old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mode", ["sequential", "dense"])
@pytest.mark.parametrize("method", [GPTQ, Rtn(group_size=16)], ids=["gptq", "rtn"])
def test_finished_blocks_are_taken_not_computed(
    mode: str, method: Any, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks 0 and 2 finished: only block 1 is computed, and the result is the same."""
    state = tmp_path / "state"
    settings: Any = {"calibration": calibration, "mode": mode, "progress": False, "state_dir": state}
    whole = compress(random_model("llama", num_hidden_layers=LAYERS), method, **settings)
    shutil.rmtree(state / "block-0001")
    solved: list[str] = []
    own = type(method).compress
    monkeypatch.setattr(
        type(method), "compress", lambda self, linear, stats: (solved.append(linear.name), own(self, linear, stats))[1]
    )
    resumed = compress(random_model("llama", num_hidden_layers=LAYERS), method, **settings)
    assert len(solved) == 7
    assert all(".1." in name for name in solved)
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert resumed.trimtab.record.metrics["resumed_blocks"] == 2
    assert resumed.trimtab.record.changed == whole.trimtab.record.changed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": Gptq(bits=2, group_size=16)}, "recipe"),
        ({"mode": "dense"}, "mode"),
        ({"seed": 1}, "seed"),
        ({"model": 1}, "model"),
        ({"calibration": CalibrationSet.from_tokens(torch.ones(2, 9, dtype=torch.int64))}, "calibration"),
    ],
)
def test_the_state_of_another_run_is_refused(
    change: dict[str, Any], named: str, calibration: CalibrationSet, tmp_path: Path
) -> None:
    settings: Any = {"calibration": calibration, "progress": False, "state_dir": tmp_path / "state"}
    compress(random_model("llama"), GPTQ, **settings)
    changed = {"method": GPTQ, "model": 0, **settings, **change}
    model = random_model("llama", changed.pop("model"))
    with pytest.raises(CheckpointError, match=f"unfinished run with another {named}"):
        compress(model, changed.pop("method"), **changed)


def test_with_force_the_state_of_another_run_is_discarded(calibration: CalibrationSet, tmp_path: Path) -> None:
    state = tmp_path / "out.partial"
    compress(random_model("llama"), GPTQ, calibration=calibration, progress=False, state_dir=state)
    with pytest.raises(CheckpointError, match="Repeat that run to finish it, or remove the directory"):
        run(tmp_path / "out")
    run(tmp_path / "out", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_no_state_is_never_touched(tmp_path: Path) -> None:
    state = tmp_path / "out.partial"
    state.mkdir()
    (state / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="not the state of a compression run"):
            run(tmp_path / "out", force=force)
    assert (state / "thesis.txt").read_text() == "mine"


def test_an_occupied_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "json"])
def test_a_damaged_block_is_refused(damage: str, calibration: CalibrationSet, tmp_path: Path) -> None:
    settings: Any = {"calibration": calibration, "progress": False, "state_dir": tmp_path / "state"}
    compress(random_model("llama"), GPTQ, **settings)
    tensors, entries = (tmp_path / "state" / "block-0001" / name for name in ("tensors.safetensors", "block.json"))
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "missing":
        tensors.unlink()
    else:
        entries.write_text(json.dumps({"sha256": "?"}))
    with pytest.raises(CheckpointError, match=r"block-0001 is damaged.*Remove it"):
        compress(random_model("llama"), GPTQ, **settings)


def test_a_full_disk_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1]

    def save(tensors: Any, path: Path) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        save_file(tensors, path)

    monkeypatch.setattr(_state, "save_file", save)
    with pytest.raises(OutputError, match=r"block-0001 cannot be written \(No space left on device\)"):
        run(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "block-0000",
        "block.json",
        "out.partial",
        "run.json",
        "tensors.safetensors",
    ]
    monkeypatch.undo()
    resumed = run(tmp_path / "out")
    assert resumed.trimtab.record.metrics["resumed_blocks"] == 1
