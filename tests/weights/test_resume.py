"""Killed at any point, a run continues: same bytes as one that was never interrupted, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trimtab.core.errors import CheckpointError, OutputError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import random_model
from trimtab.weights import _state
from trimtab.weights._compress import compress, compress_to
from trimtab.weights.gptq import Gptq
from trimtab.weights.rtn import Rtn

GPTQ = Gptq(bits=3, group_size=16)
LAYERS = 3


def run(output: Path, calibration: CalibrationSet, **settings: Any) -> Any:
    model = random_model("llama", num_hidden_layers=LAYERS)
    settings = {"method": GPTQ, "calibration": calibration, "progress": False, **settings}
    return compress_to(model, settings.pop("method"), output, **settings)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors"))}


class Kill:
    """Kills this process before the n-th time that it opens, makes, renames or removes something in `directory`."""

    EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self, directory: Path, at: int) -> None:
        self.directory = str(directory)
        self.left = at
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and any(
            isinstance(a, (str, os.PathLike)) and self.directory in str(a) for a in arguments
        ):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run_and_be_killed(directory: Path, at: int, calibration: CalibrationSet, mode: str) -> bool:
    """Compress to `directory / "out"` in a process of its own; True if it was killed, False if it ended before."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            Kill(directory, at)
            run(directory / "out", calibration, mode=mode)
            code = 0
        finally:
            os._exit(code)  # no clean-up: the parent's fixtures are the parent's
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def check_kills(points: list[int], mode: str, calibration: CalibrationSet, tmp_path: Path) -> bool:
    """Kill at each of the points, resume, compare; True if there was a point beyond the end."""
    run(tmp_path / "whole", calibration, mode=mode)
    expected = digests(tmp_path / "whole")
    for at in points:
        directory = tmp_path / f"killed-{at}"
        directory.mkdir()
        killed = run_and_be_killed(directory, at, calibration, mode)
        output = directory / "out"
        if not output.exists():  # else it was killed while it cleaned up
            run(output, calibration, mode=mode)
            assert not (directory / "out.partial").exists()
            assert [p.name for p in directory.iterdir()] == ["out"]
        assert digests(output) == expected, at
        shutil.rmtree(directory)
        if not killed:
            return True
    return False


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process, which this platform has not")
forks_with_threads = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@fork
@forks_with_threads
@pytest.mark.parametrize(("mode", "points"), [("sequential", [1, 4, 9, 16, 25, 36]), ("dense", [12, 20])])
def test_killed_and_resumed_gives_the_same_bytes(
    mode: str, points: list[int], calibration: CalibrationSet, tmp_path: Path
) -> None:
    assert not check_kills(points, mode, calibration, tmp_path)  # every point was reached


@fork
@forks_with_threads
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "dense"])
def test_killed_at_every_point(mode: str, calibration: CalibrationSet, tmp_path: Path) -> None:
    assert check_kills(list(range(1, 500)), mode, calibration, tmp_path)


@fork
@forks_with_threads
def test_killed_again_and_again(calibration: CalibrationSet, tmp_path: Path) -> None:
    """Each attempt gets a little further on what the ones before it finished."""
    run(tmp_path / "whole", calibration)
    attempts = 0
    while not (tmp_path / "out").exists():
        attempts += 1
        run_and_be_killed(tmp_path, 8 + 4 * attempts, calibration, "sequential")
        assert attempts < 20
    assert attempts > 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@fork
@forks_with_threads
def test_an_old_result_stays_whole_until_it_is_replaced(calibration: CalibrationSet, tmp_path: Path) -> None:
    run(tmp_path / "out", calibration, method=Rtn(group_size=16))
    old = digests(tmp_path / "out")
    pid = os.fork()
    if pid == 0:
        Kill(tmp_path, 30)
        run(tmp_path / "out", calibration, force=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert digests(tmp_path / "out") == old
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    run(tmp_path / "out", calibration, force=True)
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
        run(tmp_path / "out", calibration)
    run(tmp_path / "out", calibration, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_no_state_is_never_touched(calibration: CalibrationSet, tmp_path: Path) -> None:
    state = tmp_path / "out.partial"
    state.mkdir()
    (state / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="not the state of a compression run"):
            run(tmp_path / "out", calibration, force=force)
    assert (state / "thesis.txt").read_text() == "mine"


def test_an_occupied_output_is_refused_before_any_work(calibration: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run(tmp_path / "out", calibration)
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


def test_a_full_disk_leaves_what_was_finished(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [1]

    def save(tensors: Any, path: Path) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        save_file(tensors, path)

    monkeypatch.setattr(_state, "save_file", save)
    with pytest.raises(OutputError, match=r"block-0001 cannot be written \(No space left on device\)"):
        run(tmp_path / "out", calibration)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "block-0000",
        "block.json",
        "out.partial",
        "run.json",
        "tensors.safetensors",
    ]
    monkeypatch.undo()
    resumed = run(tmp_path / "out", calibration)
    assert resumed.trimtab.record.metrics["resumed_blocks"] == 1
