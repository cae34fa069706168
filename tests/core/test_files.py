"""Writing never destroys what was there: not on errors, not on a full disk, not on a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core import files
from trimtab.core.errors import OutputError
from trimtab.core.files import atomic_directory, refuse_occupied, sha256_file, write_text_atomically


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as fresh:
        (fresh / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_an_error_inside_leaves_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, force=True) as fresh:
        (fresh / "a").write_text("new")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_force_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_directory(target, force=True) as fresh:
        (fresh / "a").write_text("new")
    assert names(target) == ["a"]
    assert names(tmp_path) == ["out"]


def test_replacing_works_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    test_force_replaces_and_leaves_nothing_beside(tmp_path)


def test_an_occupied_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        refuse_occupied(tmp_path, force=False)
    refuse_occupied(tmp_path, force=True)
    with pytest.raises(OutputError, match="is a file"):
        refuse_occupied(tmp_path / "a", force=True)


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"), atomic_directory(target):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "record.json"
    write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(path.parent) == ["record.json"]


def test_a_kill_while_writing_leaves_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    program = (
        "import sys\nfrom trimtab.core.files import atomic_directory\n"
        f"with atomic_directory({str(target)!r}, force=True) as fresh:\n"
        "    (fresh / 'a').write_text('new')\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (target / "a").read_text() == "old"
    # The next writer succeeds although the killed one could not clean up.
    with atomic_directory(target, force=True) as fresh:
        (fresh / "a").write_text("newer")
    assert (target / "a").read_text() == "newer"
    assert names(tmp_path) == ["out"]


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
